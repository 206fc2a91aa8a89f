import os
import signal

import numpy as np
import psutil
import pytest

import dipgo
from benchmarks.bench.subjects import IMAGE_SEED, TIMING_SEED, ProgramSpec, inputs_of
from benchmarks.bench.worker import Worker
from benchmarks.failures import NotMeasuredError
from tests.checks import refused


@pytest.fixture
def worker(bundle, tmp_path):
    spec = ProgramSpec(folder=str(bundle), backend="onnxruntime", threads=1)
    with Worker(spec, tmp_path / "log", patience=60) as started:
        yield started


def test_it_does_what_the_program_does(worker, bundle, tmp_path):
    loaded = worker.load()
    assert loaded["batch"] == 1
    assert "ONNX Runtime CPU, 1 thread" in loaded["label"]
    worker.ask("warm_up", rounds=1)
    assert worker.ask("sample", scope="loop", prepared=True)["seconds"] > 0
    assert worker.ask("sample", scope="pipeline", prepared=True)["seconds"] > 0
    assert len(worker.ask("steps")["seconds"]) == 8
    worker.ask("latents", file=str(tmp_path / "latents.npz"))
    worker.ask("generate", start=1, count=3, seed=IMAGE_SEED, file=str(tmp_path / "made.npz"))
    with dipgo.load(bundle, 1) as program:
        given = inputs_of(program, 3)
        latent = program.denoise(program.noise(1, TIMING_SEED), program.conditions(given[:1]))
        images = program.generate(given, IMAGE_SEED)
    with np.load(tmp_path / "latents.npz") as held:
        assert np.array_equal(held["first"], latent)
        assert np.array_equal(held["last"], latent)
    with np.load(tmp_path / "made.npz") as held:
        assert np.array_equal(held["images"], images[1:2])


def test_without_a_warm_up_the_first_sample_is_the_first_run(worker, tmp_path):
    """Its memory is its own: ONNX Runtime brings no torch with it, and what the parent takes is not counted."""
    worker.load()
    found = worker.ask("sample", scope="loop", prepared=False)
    assert 0 < found["graph_seconds"] < found["seconds"]
    assert found["device_seconds"] is None
    worker.ask("latents", file=str(tmp_path / "latents.npz"))
    with np.load(tmp_path / "latents.npz") as held:
        assert np.array_equal(held["first"], held["last"])
    memory, process = worker.ask("memory"), psutil.Process(worker.pid)
    assert not any("libtorch" in entry.path for entry in process.memory_maps())
    assert memory["resident_peak"] >= process.memory_info().rss * 0.9
    assert 0 < memory["proportional_peak"] <= memory["resident_peak"]
    assert memory["resident_peak"] < psutil.Process().memory_info().rss


def test_an_error_leaves_it_alive_and_it_ends_with_its_parents_pipe(tmp_path):
    with Worker(ProgramSpec(folder=str(tmp_path), backend="onnxruntime"), tmp_path / "log", patience=60) as worker:
        with refused(r"bundle\.json", NotMeasuredError):
            worker.load()
        assert not worker.ended
    assert worker.ended
    assert not psutil.pid_exists(worker.pid)


def test_a_dead_one_is_noticed(worker):
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(NotMeasuredError, match="its process was killed by SIGKILL"):
        worker.load()
    assert worker.ended


def test_a_hung_one_is_noticed_and_ended(worker):
    worker.load()
    os.kill(worker.pid, signal.SIGSTOP)
    worker.patience = 0.5
    with pytest.raises(NotMeasuredError, match=r"no answer within 0\.5 s, taken for hung"):
        worker.ask("warm_up", rounds=1)
    assert worker.ended
