"""A program of ranges: lanes of different sizes at once, and requests outside the ranges."""

import threading

import numpy as np
import pytest
from diffusers import DDIMScheduler

import engines
from dipgo.errors import UsageError
from dipgo.models import find_model
from dipgo.sampler import tabulate
from dipgo.trace import trace
from export.compiler import prepare, write_bundle
from export.sizes import sizes_for
from tests.models import random_subnet, tiny_unconditional


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """The same SubNet for batches of 1 to 3 and sizes of 4 to 12, and for a batch of 2 and a size of 12x6 alone."""
    folder = tmp_path_factory.mktemp("dynamic")
    model = find_model(tiny_unconditional(folder / "model"))
    traced = trace(model, "down_blocks.*,up_blocks.*", 1.0, size=(8, 8))
    sampler = tabulate(DDIMScheduler(clip_sample=False), 4, False)
    subnet = random_subnet(traced, sampler, 0, 0.5, 2, 1)
    for name, batch, size in (("ranges", "1:3", "4:12"), ("alone", 2, "12x6")):
        prepared = prepare(traced, sizes=sizes_for(model, batch, size))
        write_bundle(prepared, subnet, sampler, folder / name)
    return folder


def test_sizes_agree_with_a_bundle_made_for_one(bundles):
    with engines.load(bundles / "ranges") as ranges, engines.load(bundles / "alone") as alone:
        assert (ranges.batch, ranges.size) == (3, (8, 8))
        assert (alone.batch, alone.size) == (2, (12, 6))
        noise = alone.noise(2, 0)
        assert noise.shape == (2, 3, 12, 6)
        assert np.array_equal(noise, ranges.noise(2, 0, (12, 6)))
        expected, actual = alone.denoise(noise, {}), ranges.denoise(noise, {})
        assert np.linalg.norm(actual - expected) <= 1e-5 * np.linalg.norm(expected)


def test_two_sizes_in_two_threads(bundles):
    """Each lane is of one size; none sees the other's values."""
    sizes = {1: (4, 12), 2: (12, 8), 3: (4, 12)}
    with engines.load(bundles / "ranges") as program:
        noise = {seed: program.noise(seed, seed, size) for seed, size in sizes.items()}
        expected = {seed: program.denoise(noise[seed], {}) for seed in sizes}
        results = {seed: [] for seed in sizes}

        def work(seed):
            for _ in range(5):
                results[seed].append(program.denoise(noise[seed], {}))

        threads = [threading.Thread(target=work, args=(seed,)) for seed in sizes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for seed, made in results.items():
            assert len(made) == 5
            assert all(np.array_equal(each, expected[seed]) for each in made)


def test_requests_outside_the_ranges_are_refused(bundles):
    with engines.load(bundles / "ranges") as program:
        ranges = r"compiled for \[1 to 3, 3, 4 to 12 by 2, 4 to 12 by 2\]"
        for shape in ((4, 3, 8, 8), (1, 3, 14, 8), (1, 3, 8, 7), (1, 4, 8, 8), (3, 8, 8)):
            with pytest.raises(UsageError, match=ranges) as caught:
                program.denoise(np.zeros(shape, np.float32), {})
            assert str(list(shape)) in str(caught.value)
        with pytest.raises(UsageError, match=r"ranges: height 14, it takes multiples of 2 from 4 to 12"):
            program.noise(1, 0, (14, 8))
        with pytest.raises(UsageError, match=r"ranges: width 7, it takes multiples of 2 from 4 to 12"):
            program.latent_shape(1, (8, 7))
    with engines.load(bundles / "alone") as program, pytest.raises(UsageError, match=r"alone: height 8, it takes 12;"):
        program.noise(1, 0, (8, 6))
