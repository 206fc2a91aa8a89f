"""Nothing of a call is left for the next: whatever went wrong, images are those of a fresh process, bit for bit."""

import threading
from unittest import mock

import numpy as np
import pytest
import torch

import dipgo
from dipgo.base.errors import UsageError
from tests.checks import error, in_threads, python, refused
from tests.engines.dropin import compiled

FRESH = """
import numpy, dipgo
pipe = dipgo.load(sys.argv[1], threads=1)
pipe.set_progress_bar_config(disable=True)
numpy.save(sys.argv[2], pipe(class_labels=[0, 2], generator=11, output_type="np").images)
"""


@pytest.fixture(scope="module")
def dit():
    return compiled("dit")


@pytest.fixture(scope="module")
def fresh(dit, tmp_path_factory):
    """The images of a process that does nothing else, without torch."""
    path = tmp_path_factory.mktemp("fresh") / "images.npy"
    python(FRESH, dit.folder, path, without="torch diffusers transformers")
    return np.load(path)


@pytest.fixture
def pipe(dit):
    with dipgo.load(dit.folder, threads=1) as pipe:
        pipe.set_progress_bar_config(disable=True)
        yield pipe


def images(pipe, labels=(0, 2), seed=11, **options):
    return pipe(**{"class_labels": list(labels), "generator": seed, "output_type": "np", **options}).images


def raising(error, at=1):
    def callback(owner, step, timestep, given):
        if step == at:
            raise error
        return given

    return callback


def stop(owner, step, timestep, given):
    owner._interrupt = True
    return given


def test_a_fresh_process_gives_the_images_of_the_pipeline(dit, fresh):
    assert error(fresh, dit.expected(class_labels=[0, 2], seed=11)) <= 1e-4


def test_calls_that_are_cancelled_refused_or_interrupted(pipe, fresh):
    for failure in (RuntimeError("stop"), KeyboardInterrupt()):
        for at in (0, 2, 3):
            with pytest.raises(type(failure)):
                images(pipe, (1, 1), 5, callback_on_step_end=raising(failure, at))
            assert np.array_equal(images(pipe), fresh)
    images(pipe, (1, 1), 5, callback_on_step_end=stop)
    assert not pipe._interrupt
    assert np.array_equal(images(pipe), fresh)
    with pytest.raises(UsageError):
        images(pipe, num_inference_steps=7)
    pipe.close()  # which the next call opens again
    assert np.array_equal(images(pipe), fresh)


def test_a_call_whose_trajectories_are_one_launch_is_interrupted_between_them(pipe, monkeypatch):
    """As CUDA graphs are: nobody can stop one, but the next image need not begin."""
    first, launched = images(pipe, (0,), latents=np.ones((1, 4, 8, 8)), output_type="latent"), []
    pipe.close()

    def capture(launches):
        def whole():
            for launch in launches:
                launch()
            launched.append(len(launches))
            pipe._interrupt = True

        return whole

    monkeypatch.setattr(pipe.runner, "capture", capture)
    latents = images(pipe, (0, 2, 1), latents=np.ones((3, 4, 8, 8)), output_type="latent")
    assert len(launched) == 1
    assert np.array_equal(latents[:1], first)


def test_a_call_within_a_callback(pipe, fresh):
    """The inner call is interrupted, the outer is not."""

    def nested(owner, step, timestep, given):
        images(owner, (1,), step, callback_on_step_end=stop)
        return given

    assert np.array_equal(images(pipe, callback_on_step_end=nested), fresh)


def test_values_that_are_no_numbers(pipe, fresh):
    """A product of NaN with a coefficient of 0 is NaN: nothing may read what an earlier call left."""
    conditions = pipe.conditions([1] * pipe.batch)
    for value in (np.nan, np.inf):
        with refused(r"ε of step 1 of \d+ is not finite"):
            pipe.denoise(np.full(pipe.latent_shape(pipe.batch), value, np.float32), conditions)
    assert np.array_equal(images(pipe), fresh)


def test_two_threads(pipe, fresh):
    """Each with classes and a seed of its own; one is cancelled now and then."""
    expected = {seed: images(pipe, (seed % 3, 1), seed) for seed in (1, 2)}

    def work(seed):
        for turn in range(4):
            if seed == 1 and turn % 2:
                with pytest.raises(RuntimeError):
                    images(pipe, (2, 2), 9, callback_on_step_end=raising(RuntimeError("stop")))
            assert np.array_equal(images(pipe, (seed % 3, 1), seed), expected[seed])

    in_threads(work, expected)
    assert np.array_equal(images(pipe), fresh)


def test_a_thread_outside_interrupts_calls_under_way(pipe, fresh):
    inside, go = threading.Event(), threading.Event()
    steps = []

    def wait(owner, step, timestep, given):
        steps.append(step)
        inside.set()
        assert go.wait(30)
        return given

    thread = threading.Thread(target=images, args=(pipe, (1,), 5), kwargs={"callback_on_step_end": wait})
    thread.start()
    assert inside.wait(30)
    pipe._interrupt = True
    go.set()
    thread.join()
    assert steps == [0]
    assert np.array_equal(images(pipe), fresh)


def test_an_attached_bundle_keeps_nothing_either(dit):
    def fail(*_):
        raise KeyboardInterrupt

    with dipgo.attach(dit.pipe, dit.folder) as attached:
        first = dit.call(attached)
        hook = attached.vae.decoder.register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            dit.call(attached, seed=5)
        hook.remove()
        with mock.patch.object(attached.scheduler, "step", fail), pytest.raises(KeyboardInterrupt):
            dit.call(attached, seed=5)
        assert np.array_equal(dit.call(attached), first)
    with dipgo.attach(dit.pipe, dit.folder) as attached:
        assert np.array_equal(dit.call(attached), first)


def test_one_program_serves_pipelines_in_two_threads(dit):
    """Two diffusers pipelines, one set of engines."""
    program, scheduler, pipes = dipgo.load(dit.folder, threads=1), dit.pipe.scheduler, {}
    for seed in (1, 2):
        own = {"scheduler": type(scheduler)(**scheduler.config)}
        pipes[seed] = type(dit.pipe)(**dit.pipe.components | own)
        pipes[seed].set_progress_bar_config(disable=True)
        dipgo.attach(pipes[seed], program)
    expected = {seed: dit.call(pipes[1], seed=seed) for seed in pipes}

    @torch.no_grad()
    def work(seed):
        return [dit.call(pipes[seed], seed=seed) for _ in range(3)]

    for seed, made in in_threads(work, pipes).items():
        assert all(np.array_equal(each, expected[seed]) for each in made)
    for pipe in pipes.values():
        dipgo.detach(pipe)
    program.close()
