"""The Fréchet distance between two sets of features (Heusel et al. 2017, eq. 6), and features of digits."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

GROUPS = 64


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
    found = np.array([frechet(np.delete(features, group, axis=0), reference) for group in groups])
    count, centre = len(groups), frechet(features, reference)
    half = 1.96 * float(np.sqrt((count - 1) / count * np.square(found - found.mean()).sum()))
    return max(0.0, centre - half), centre + half


def digit_features(images: np.ndarray) -> np.ndarray:
    """Return the classifier's features ``[n, 96]`` of digits ``[n, 32, 32, 1]`` in [0, 1], float64."""
    import torch

    from benchmarks.bench.digit_classifier import load_classifier

    with torch.no_grad():
        found = load_classifier().features(torch.from_numpy(images).permute(0, 3, 1, 2).float() * 2 - 1)
    return found.double().numpy()


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
