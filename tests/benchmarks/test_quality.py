import numpy as np
import pytest

from benchmarks.bench.digit_classifier import load_digits
from benchmarks.bench.quality import (
    CEILING_DB,
    Outputs,
    bootstrap_mean,
    classified,
    compare,
    image_psnr,
    image_ssim,
    is_digits,
    latent_error,
    psnr,
)


def test_psnr_of_a_known_error():
    reference = np.zeros((2, 4, 4, 1), np.float32)
    images = reference.copy()
    images[0] = 0.1  # MSE 0.01 in one image, 0 in the other
    assert psnr(images[:1], reference[:1]) == pytest.approx(20)
    assert psnr(images, reference) == pytest.approx(10 * np.log10(200))
    assert image_psnr(images, reference) == pytest.approx([20, CEILING_DB])
    assert psnr(reference, reference) == CEILING_DB


def test_the_interval_of_a_mean():
    values = np.random.default_rng(1).normal(30, 2, 400)
    low, high = bootstrap_mean(values)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * 2 / 20, rel=0.15)
    assert bootstrap_mean(values) == (low, high)
    assert bootstrap_mean(np.full(5, 3.0)) == (3.0, 3.0)


def test_class_accuracy_on_real_digits():
    digits, labels = load_digits("held-out")
    images = (digits.permute(0, 2, 3, 1).numpy() + 1) / 2
    right = classified(images, labels.tolist()).mean()
    assert right >= 0.97
    assert classified(images, ((labels + 1) % 10).tolist()).mean() <= 1 - right


def test_similarity_of_structure_and_errors_of_latents():
    generator = np.random.default_rng(0)
    images = generator.random((3, 32, 32, 1), np.float32)
    noisy = np.clip(images + generator.normal(0, 0.05, images.shape).astype(np.float32), 0, 1)
    same, off = image_ssim(images, images), image_ssim(noisy, images)
    assert same == pytest.approx(1)
    assert (off < same).all()
    assert (off > 0.5).all()
    latents = np.ones((2, 4, 8, 8), np.float32)
    assert latent_error(latents * 1.1, latents) == pytest.approx(0.1, rel=1e-5)


def test_everything_that_can_be_judged_of_digits_is():
    digits, labels = load_digits("held-out")
    images = (digits[:40].permute(0, 2, 3, 1).numpy() + 1) / 2
    reference, latents = Outputs(np.ones((40, 4, 8, 8), np.float32), images), np.full((40, 4, 8, 8), 1.01, np.float32)
    converged = Outputs(reference.latents[:5] * 2, images[:5])
    found = compare(Outputs(latents, images), reference, labels[:40].tolist(), "digits-dit", converged)
    assert found.psnr_db == CEILING_DB
    assert found.ssim == pytest.approx(1)
    assert found.latent_error == pytest.approx(0.01, rel=1e-4)
    assert (found.converged_images, found.converged_psnr_db) == (5, CEILING_DB)
    assert found.converged_latent_error == pytest.approx(0.495, rel=1e-4)
    assert found.class_accuracy_low <= found.class_accuracy <= found.class_accuracy_high
    assert found.frechet_low <= found.frechet <= found.frechet_high
    assert len(found.each_psnr_db) == 40
    assert found.skipped == ["CLIP score and FID: no weights were given (see benchmarks.studies.evaluate)"]
    assert is_digits("digits-dit", images)
    assert not is_digits("digits-dit", np.zeros((3, 16, 16, 3)))
    other = compare(Outputs(latents, images), reference, labels[:40].tolist(), "another")
    assert other.class_accuracy is other.frechet is other.converged_images is None
    assert any("no classifier" in line for line in other.skipped)
