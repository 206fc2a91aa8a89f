"""Pixels to pictures."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image


def to_image(pixels: np.ndarray) -> Image.Image:
    """Turn pixels ``[height, width, 1 or 3]`` in [0, 1] into a picture, rounded as diffusers does."""
    levels = (pixels * 255).round().astype(np.uint8)
    return Image.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels)


def grid(pixels: np.ndarray, columns: int | None = None) -> Image.Image:
    """Set pictures ``[n, height, width, channels]`` side by side, near a square unless ``columns`` is given."""
    count, height, width, _ = pixels.shape
    columns = columns or math.ceil(math.sqrt(count))
    canvas = np.zeros((math.ceil(count / columns) * height, columns * width, pixels.shape[3]), pixels.dtype)
    for index, picture in enumerate(pixels):
        row, column = divmod(index, columns)
        canvas[row * height : (row + 1) * height, column * width : (column + 1) * width] = picture
    return to_image(canvas)
