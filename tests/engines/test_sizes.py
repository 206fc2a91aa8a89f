"""A program of ranges: contexts of different sizes at once, and requests outside the ranges."""

import gc
import itertools
import weakref

import numpy as np
import pytest

import dipgo
from engines.context import ExecutionContext
from engines.context_pool import IDLE
from engines.steps import Steps, Walk
from engines.torchrt import runner
from export.compiler import write_bundle
from tests import zoo
from tests.checks import error, in_threads, misused
from tests.models import random_subnet


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """The same SubNet for batches of 1 to 3 and sizes of 4 to 12, and for a batch of 2 and a size of 12x6 alone."""
    folder = tmp_path_factory.mktemp("dynamic")
    traced, sampler = zoo.trace("unconditional", size=(8, 8)), zoo.sampler("unconditional", 4)
    subnet = random_subnet(traced, sampler, 0, 0.5, 2, 2)
    for name, batch, size in (("ranges", "1:3", "4:12"), ("alone", 2, "12x6")):
        write_bundle(zoo.converted(traced, batch, size), subnet, sampler, folder / name)
    return folder


def test_sizes_agree_with_a_bundle_made_for_one(bundles):
    with dipgo.load(bundles / "ranges") as ranges, dipgo.load(bundles / "alone") as alone:
        assert (ranges.batch, ranges.size) == (3, (8, 8))
        assert (alone.batch, alone.size) == (2, (12, 6))
        noise = alone.noise(2, 0)
        assert noise.shape == (2, 3, 12, 6)
        assert np.array_equal(noise, ranges.noise(2, 0, (12, 6)))
        expected, actual = alone.denoise(noise, {}), ranges.denoise(noise, {})
        assert error(actual, expected) <= 1e-5


def test_two_sizes_in_two_threads(bundles):
    """Each context is of one size; none sees the other's values."""
    sizes = {1: (4, 12), 2: (12, 8), 3: (4, 12)}
    with dipgo.load(bundles / "ranges") as program:
        noise = {seed: program.noise(seed, seed, size) for seed, size in sizes.items()}
        expected = {seed: program.denoise(noise[seed], {}) for seed in sizes}
        made = in_threads(lambda seed: [program.denoise(noise[seed], {}) for _ in range(5)], sizes)
        for seed in sizes:
            assert all(np.array_equal(each, expected[seed]) for each in made[seed])


SIZES = list(itertools.product(range(4, 13, 2), repeat=2))


def living(references):
    return sum(reference() is not None for reference in references)


def test_few_contexts_wait_for_their_next_trajectory(bundles, monkeypatch):
    """Of all sizes together, and after a call of many images; the others' memory is free at once."""
    made = []

    class Watched(ExecutionContext):
        def __init__(self, *parts):
            super().__init__(*parts)
            made.append(weakref.ref(self))

    monkeypatch.setattr("engines.context_pool.ExecutionContext", Watched)
    with dipgo.load(bundles / "ranges") as program:
        latents = [program.denoise(program.noise(1, 0, size), {}) for size in SIZES]
        assert (len(made), living(made)) == (len(SIZES), IDLE)
        for size, latent in list(zip(SIZES, latents, strict=True))[-IDLE:]:
            assert np.array_equal(program.denoise(program.noise(1, 0, size), {}), latent)
        assert len(made) == len(SIZES)
        with Steps(program.contexts, (40, 3, 8, 8), {}):
            assert living(made) >= 14
        assert living(made) == IDLE
        assert np.array_equal(program.denoise(program.noise(1, 0, SIZES[0]), {}), latents[0])


def test_torch_keeps_the_graphs_of_few_sizes(bundles, monkeypatch):
    """A trajectory under way goes on with those that it began with."""
    made, files, module_from_graph = [], set(), runner.module_from_graph

    def watched(path, *parts):
        lifted = module_from_graph(path, *parts)
        made.append(weakref.ref(lifted.module))
        files.add(path)
        return lifted

    monkeypatch.setattr(runner, "module_from_graph", watched)
    with dipgo.load(bundles / "ranges", backend="torch-cpu") as program:
        noise = program.noise(2, 0, SIZES[0])
        expected = program.denoise(noise, {})
        with Steps(program.contexts, noise.shape, {}) as steps:
            walk = Walk(steps, noise)
            walk.advance()
            for size in SIZES[1:]:
                program.denoise(program.noise(1, 0, size), {})
            while walk.step < len(program.record.steps):
                walk.advance()
            assert np.array_equal(walk.latent, expected)
        gc.collect()
        assert len(made) == len(files) * len(SIZES)
        assert living(made) <= len(files) * (runner.SIZES_AT_ONCE + 1)


def test_requests_outside_the_ranges_are_refused(bundles):
    with dipgo.load(bundles / "ranges") as program:
        ranges = r"compiled for \[1 to 3, 3, 4 to 12 by 2, 4 to 12 by 2\]"
        for shape in ((4, 3, 8, 8), (1, 3, 14, 8), (1, 3, 8, 7), (1, 4, 8, 8), (3, 8, 8)):
            with misused(ranges) as caught:
                program.denoise(np.zeros(shape, np.float32), {})
            assert str(list(shape)) in str(caught.value)
        with misused(r"ranges: height 14, it takes multiples of 2 from 4 to 12"):
            program.noise(1, 0, (14, 8))
        with misused(r"ranges: width 7, it takes multiples of 2 from 4 to 12"):
            program.latent_shape(1, (8, 7))
    with dipgo.load(bundles / "alone") as program, misused(r"alone: height 8, it takes 12;"):
        program.noise(1, 0, (8, 6))
