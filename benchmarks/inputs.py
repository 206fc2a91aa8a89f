"""What programs are given to work on, the same for all of them; free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from engines import Program
from export.bundle import BundleRecord

PARITY_SEED = 0
TIMING_SEED = 1
IMAGE_SEED = 7_000_000  # the search draws from other seeds

PROMPTS = (
    "a red fox in the snow",
    "Two dogs, sleeping in the rain",
    "an oil painting of a harbour at dusk",
    "a bowl of oranges on a wooden table, soft light",
)

Given = list[Any]
"""Classes or prompts, one an image."""


def given_of(program: Program, count: int) -> Given:
    """Return ``count`` classes, cycling through the model's labels, or as many prompts where these condition."""
    return given_for(program.record.conditioning.kind, program.record.conditioning.labels, count)


def given_for(kind: str, labels: dict[str, int], count: int) -> Given:
    """Return ``count`` classes or prompts for a model that is conditioned by ``kind`` and has these classes."""
    if kind != "class":
        return [PROMPTS[index % len(PROMPTS)] for index in range(count)]
    numbers = sorted(set(labels.values())) or [0]
    return [numbers[index % len(numbers)] for index in range(count)]


def latent_shape(record: BundleRecord) -> list[int]:
    """Return the latent's shape ``[B, C, H, W]``; sizes that are chosen at run time as the bundle was made best for."""
    return [side if isinstance(side, int) else record.axes[side].opt for side in record.latent.shape]


def save(file: str | Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays into an npz file, which :func:`numpy.load` reads without unpickling anything."""
    held: dict[str, Any] = dict(arrays)
    np.savez(file, **held)


def encodes(program: Program) -> bool:
    """Whether a program makes its conditions from classes or prompts by itself."""
    conditioning = program.record.conditioning
    return conditioning.kind != "prompt" or conditioning.encoder is not None
