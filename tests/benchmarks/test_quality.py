from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import engines
from benchmarks.quality import (
    CEILING_DB,
    bootstrap_mean,
    class_accuracy,
    compare,
    generate,
    image_psnr,
    is_digits,
    psnr,
)
from dipgo.zoo.digits import load_digits


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
    right = class_accuracy(images, labels.tolist())
    assert right >= 0.97
    assert class_accuracy(images, ((labels + 1) % 10).tolist()) <= 1 - right


def test_only_digits_are_classified():
    digits = np.random.default_rng(0).random((3, 32, 32, 1), np.float32)
    assert is_digits("digits-dit", digits)
    assert compare(digits, digits, [0, 1, 2], "digits-dit").class_accuracy is not None
    assert compare(digits, digits, [0, 1, 2], "other").class_accuracy is None
    assert not is_digits("digits-dit", np.zeros((3, 16, 16, 3)))


def test_generated_images_are_the_same_each_time_and_differ_from_each_other(bundle: Path):
    with engines.load(bundle, threads=1) as program:
        images, again = generate(program, 3), generate(program, 3)
    assert images.shape == (3, 16, 16, 3)
    assert np.array_equal(images, again)
    assert np.abs(images[0] - images[1]).max() > 0.01
