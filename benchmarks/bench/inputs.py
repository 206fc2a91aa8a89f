"""What programs are given to work on, the same for all of them; free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from engines.program import Program
from export.bundle import BundleRecord, ConditioningRecord

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
    """Return ``count`` classes or prompts for a program, see :func:`given_for`."""
    return given_for(program.record.conditioning, count)


def given_for(conditioning: ConditioningRecord, count: int) -> Given:
    """Return ``count`` classes, or prompts where these condition, cycling through the model's own if it has any."""
    some: Given = conditioning.prompts or list(PROMPTS)
    if conditioning.kind == "class":
        some = sorted(set(conditioning.labels.values())) or [0]
    return [some[index % len(some)] for index in range(count)]


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
