"""Quality: how far a program's images are from the full program's, and whether they show what was asked for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.parity import given_of
from benchmarks.progress import Progress, counted, silent
from dipgo.errors import DipgoError
from dipgo.records import Record
from engines import Program

SEED = 7_000_000  # the search draws from other seeds
CEILING_DB = 150.0  # identical images; float32 pixels cannot differ by less


class Quality(Record):
    """Images of one program against those of the full program from the same noise and classes.

    ``psnr_db`` is over all pixels together. ``image_psnr_db`` is the mean of the images' own PSNR, with its bootstrap
    95 % interval. ``class_accuracy`` is the share of images that the project's classifier takes for the class asked
    for; None where there is no classifier.
    """

    images: int
    psnr_db: float
    image_psnr_db: float
    image_psnr_low_db: float
    image_psnr_high_db: float
    class_accuracy: float | None


def generate(program: Program, count: int, name: str = "", progress: Progress = silent) -> np.ndarray:
    """Generate ``count`` images from the quality seed, their classes cycling through the model's labels.

    Returns:
        Pixels ``[count, height, width, channels]`` in [0, 1].

    Raises:
        DipgoError: images that are not finite.
    """
    images = program.generate(given_of(program, count), SEED, counted(progress, f"images: {name}"))
    if not np.isfinite(images).all():
        raise DipgoError("its images are not finite")
    return images


def compare(images: np.ndarray, reference: np.ndarray, classes: Sequence[int], model: str) -> Quality:
    """Compare a program's images with the full program's; ``model`` says whether there is a classifier for them."""
    own = image_psnr(images, reference)
    low, high = bootstrap_mean(own)
    return Quality(
        images=len(images),
        psnr_db=psnr(images, reference),
        image_psnr_db=float(own.mean()),
        image_psnr_low_db=low,
        image_psnr_high_db=high,
        class_accuracy=class_accuracy(images, classes) if is_digits(model, images) else None,
    )


def psnr(images: np.ndarray, reference: np.ndarray) -> float:
    """Return 10 log10(1 / MSE) in dB over all pixels together, for images in [0, 1]; at most ``CEILING_DB``."""
    return float(_decibels(np.square(images.astype(np.float64) - reference).mean()))


def image_psnr(images: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return each image's own PSNR in dB, ``[n]``."""
    error = np.square(images.astype(np.float64) - reference)
    return _decibels(error.reshape(len(images), -1).mean(axis=1))


def bootstrap_mean(values: np.ndarray, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Return the percentile bootstrap 95 % interval of the mean of ``values`` ``[n]``."""
    picks = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    low, high = np.percentile(values[picks].mean(axis=1), (2.5, 97.5))
    return float(low), float(high)


def is_digits(model: str, images: np.ndarray) -> bool:
    """Whether the classifier of ``dipgo.zoo.digits`` can judge these images."""
    return model == "digits-dit" and images.shape[1:] == (32, 32, 1)


def class_accuracy(images: np.ndarray, classes: Sequence[int]) -> float:
    """Return the share of digits ``[n, 32, 32, 1]`` in [0, 1] that are classified as ``classes``."""
    import torch

    from dipgo.zoo.digits import load_classifier

    with torch.no_grad():
        logits = load_classifier()(torch.from_numpy(images).permute(0, 3, 1, 2).float() * 2 - 1)
    return float((logits.argmax(dim=1).numpy() == np.asarray(classes)).mean())


def _decibels(error: np.ndarray) -> np.ndarray:
    return -10 * np.log10(np.maximum(error, 10 ** (-CEILING_DB / 10)))
