import numpy as np
import pytest

from benchmarks.bench.digit_classifier import load_digits
from benchmarks.bench.quality import digit_features, frechet, frechet_interval, real_digit_features


def test_between_samples_of_known_normal_distributions():
    """For diagonal covariances the distance is ``|m - m'|² + Σ (σ - σ')²``."""
    generator = np.random.default_rng(0)
    first = generator.normal([0, 0, 0], [1, 2, 1], (200_000, 3))
    second = generator.normal([1, 0, 2], [1, 1, 3], (200_000, 3))
    assert frechet(first, second) == pytest.approx(1 + 4 + 1 + 4, rel=0.01)
    assert frechet(first, first) == pytest.approx(0, abs=1e-9)


def test_it_does_not_turn_on_the_axes_and_lies_in_its_interval():
    generator = np.random.default_rng(1)
    first, second = generator.normal(size=(50, 4)), generator.normal(1, 2, (60, 4))
    turn, _ = np.linalg.qr(generator.normal(size=(4, 4)))
    assert frechet(first @ turn, second @ turn) == pytest.approx(frechet(first, second))
    assert frechet(second, first) == pytest.approx(frechet(first, second))
    generator = np.random.default_rng(2)
    features, reference = generator.normal(0.5, 1, (400, 2)), generator.normal(0, 1, (5000, 2))
    low, high = frechet_interval(features, reference)
    assert low < 0.5 < high < low + 0.6
    assert low < frechet(features, reference) < high


def test_intervals_are_as_wide_as_distances_scatter():
    """Of two samples of one kind, one's distance lies in the other's 95 % interval five times in six."""
    generator = np.random.default_rng(3)
    reference = generator.normal(0, 1, (2000, 8))
    samples = [generator.normal(0.3, 1, (100, 8)) for _ in range(40)]
    distances = np.array([frechet(sample, reference) for sample in samples])
    within = [(low < distances) & (distances < high) for low, high in (frechet_interval(s, reference) for s in samples)]
    assert np.mean(within) == pytest.approx(0.83, abs=0.08)


@pytest.mark.slow
def test_real_digits_are_nearer_to_real_digits_than_noise_is():
    digits, _ = load_digits("train")
    images = (digits[:200].permute(0, 2, 3, 1).numpy() + 1) / 2
    real = real_digit_features()
    assert real.shape == (500, 96)
    noisy = np.clip(images + np.random.default_rng(0).normal(0, 0.3, images.shape), 0, 1).astype(np.float32)
    assert frechet(digit_features(images), real) < 0.3 * frechet(digit_features(noisy), real)
