"""The images of a report: rows of them by wall time, how they differ from the full program's, and the worst one."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from benchmarks.bench.baselines import EQUAL_TIME, FULL
from benchmarks.bench.report import SUBJECT, Row, decibels, milliseconds
from engines.pipeline.images import grid, to_image

SMALL = 128  # images with shorter sides are shown enlarged, pixel by pixel
LARGE = 256  # those with longer ones as thumbnails
SHOWN_SMALL, SHOWN = 8, 4  # images a program, the worst one among them
GAIN = 4  # by which differences are multiplied
SIDE, LEFT, FONT = 96, 196, 17  # of the picture, in pixels: an image's side at least, the labels' width, their height


@dataclass(frozen=True)
class Strip:
    """Images of one program, and their differences to the full program's, as PNG data URIs."""

    name: str
    figures: str
    images: list[str]
    differences: list[str] = field(default_factory=list)


def shown(rows: Sequence[Row], count: int, size: Sequence[int]) -> tuple[list[int], int | None]:
    """Return which of ``count`` images are shown: the first ones, then the bundle's worst; and which that is."""
    most = SHOWN_SMALL if min(size) < SMALL else SHOWN
    own = next((row.quality for row in rows if row.name == SUBJECT), None)
    if own is None or not own.each_psnr_db or not count:
        return list(range(min(most, count))), None
    worst = int(np.argmin(own.each_psnr_db[:count]))
    return [*[number for number in range(count) if number != worst][: most - 1], worst], worst


def strips_of(rows: Sequence[Row], pictures: Mapping[str, np.ndarray], chosen: Sequence[int]) -> list[Strip]:
    """Return the strips of all programs that made images, the fastest first."""
    made = [row for row in rows if row.name in pictures and row.timing]
    reference = pictures.get(FULL)
    strips = []
    for row in sorted(made, key=_seconds):
        images = pictures[row.name][chosen]
        differences: list[str] = []
        if row.name != FULL and reference is not None:
            differences = [_data_uri(each) for each in (GAIN * np.abs(images - reference[chosen])).clip(0, 1)]
        strips.append(Strip(row.name, _figures(row), [_data_uri(image) for image in images], differences))
    return strips


def picture(rows: Sequence[Row], pictures: Mapping[str, np.ndarray], chosen: Sequence[int]) -> Image.Image | None:
    """Return labelled rows of images from the same noise: full, dipgo, and plain steps that take as long."""
    named = {row.name: row for row in rows if row.timing and row.name in pictures}
    plain = EQUAL_TIME if EQUAL_TIME in named else "fewer steps"
    return labelled({label(row): pictures[name][chosen] for name in (FULL, SUBJECT, plain) if (row := named.get(name))})


def label(row: Row) -> str:
    """Return a program's name, time, speedup and PSNR on lines of their own."""
    assert row.timing
    lines = [f"{program_of(row)}, {milliseconds(row.timing.wall.median)}"]
    lines.append(f"{row.timing.speedup.median:.1f} times as fast")
    if row.name == FULL:
        lines[1] = f"{row.steps} steps"
    elif row.quality:
        lines.append(f"{decibels(row.quality.psnr_db)} from full")
    return "\n".join(lines)


def program_of(row: Row) -> str:
    """Return what a row is called where it stands beside the full program and the bundle alone."""
    return f"{row.steps} plain steps" if row.name.startswith("fewer steps") else row.name


def labelled(rows: Mapping[str, np.ndarray]) -> Image.Image | None:
    """Draw a row of images ``[n, height, width, channels]`` in [0, 1] beside each label; None without rows."""
    if not rows:
        return None
    images = np.stack(list(rows.values()))
    scale = -(-SIDE // images.shape[2])
    pictures = grid(images.reshape(-1, *images.shape[2:]), columns=images.shape[1])
    pictures = pictures.resize((pictures.width * scale, pictures.height * scale), resample=Image.Resampling.LANCZOS)
    canvas = Image.new("RGB", (LEFT + pictures.width, pictures.height), "white")
    canvas.paste(pictures, (LEFT, 0))
    draw, height = ImageDraw.Draw(canvas), pictures.height // len(rows)
    for number, text in enumerate(rows):
        middle = (8, number * height + height // 2)
        draw.text(middle, text, "black", ImageFont.load_default(FONT), anchor="lm", spacing=6)
    return canvas.quantize(256)


def save(image: Image.Image, path: Path) -> None:
    """Write a picture as PNG."""
    image.save(path, format="PNG", optimize=True)


def _figures(row: Row) -> str:
    assert row.timing
    time = milliseconds(row.timing.wall.median)
    return f"{time}, {decibels(row.quality.psnr_db)}" if row.quality and row.name != FULL else time


def _seconds(row: Row) -> float:
    return row.timing.wall.median if row.timing else 0.0


def _data_uri(pixels: np.ndarray) -> str:
    image, stream = to_image(pixels), io.BytesIO()
    if max(image.size) > LARGE:
        image.thumbnail((LARGE, LARGE))
    image.save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
