"""What a ControlNet is given beside the denoiser's own inputs. Free of torch."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

PICTURE = "controlnet_cond"
"""The condition that holds the pictures in [0, 1] of all ControlNets, side by side in channels."""
STRENGTH = "conditioning_scale"
"""The condition by which what each ControlNet adds is multiplied, ``[rows, ControlNets, 1, 1]``, step by step."""
_LINES = 12


def kept(steps: int, start: float, end: float) -> np.ndarray:
    """Return which of ``steps`` a ControlNet counts in, 1 or 0 each, as diffusers' pipelines have it.

    ``start`` and ``end`` are shares of the steps: what is not wholly between them is left out.
    """
    return np.array([float(k / steps >= start and (k + 1) / steps <= end) for k in range(steps)], np.float32)


def drawings(subjects: Sequence[Any], nets: int, size: tuple[int, int], channels: int = 3) -> np.ndarray:
    """Return pictures of white lines on black, which stand where nobody gives others: for searches and measurements.

    They depend on the subject and the number of the ControlNet alone: ``[subjects, channels · nets, *size]`` in [0, 1].
    """
    return np.stack(
        [np.concatenate([_drawing(f"{each}/{net}", size, channels) for net in range(nets)]) for each in subjects]
    )


def _drawing(subject: str, size: tuple[int, int], channels: int) -> np.ndarray:
    generator, (height, width) = np.random.default_rng(zlib.crc32(subject.encode())), size
    picture = Image.new("L", (width, height))
    draw = ImageDraw.Draw(picture)
    for points in generator.random((_LINES, 3, 2)) * (width, height):
        draw.line([tuple(point) for point in points], fill=255, width=max(1, min(size) // 128), joint="curve")
    return np.repeat(np.asarray(picture, np.float32)[None] / 255, channels, axis=0)
