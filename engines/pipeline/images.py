"""Pixels to pictures."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
from PIL import Image

from dipgo.base.errors import DipgoError, one_line
from dipgo.base.inputs import read_input

LARGEST_PICTURE = 64 * 2**20  # bytes of a file


def to_image(pixels: np.ndarray) -> Image.Image:
    """Turn pixels ``[height, width, 1 or 3]`` in [0, 1] into a picture, rounded as diffusers does."""
    levels = (pixels * 255).round().astype(np.uint8)
    return Image.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels)


def read_picture(path: Path, mode: str) -> Image.Image:
    """Read a picture from a file, as one of a mode such as RGB.

    Raises:
        DipgoError: no such file, or none that holds a picture.
    """
    content = read_input(path, "picture", LARGEST_PICTURE)
    try:
        with Image.open(io.BytesIO(content)) as picture:
            return picture.convert(mode)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DipgoError(f"{path}: not a picture that can be read ({one_line(error)}); give a PNG or JPEG") from error


def grid(pixels: np.ndarray, columns: int | None = None) -> Image.Image:
    """Set pictures ``[n, height, width, channels]`` side by side, near a square unless ``columns`` is given."""
    count, height, width, _ = pixels.shape
    columns = columns or math.ceil(math.sqrt(count))
    canvas = np.zeros((math.ceil(count / columns) * height, columns * width, pixels.shape[3]), pixels.dtype)
    for index, picture in enumerate(pixels):
        row, column = divmod(index, columns)
        canvas[row * height : (row + 1) * height, column * width : (column + 1) * width] = picture
    return to_image(canvas)
