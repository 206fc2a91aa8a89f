"""The picture of a report: images of the full model, of the bundle, and of as many plain steps as take as long."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from benchmarks.bench.reference import model_of, task_of
from benchmarks.bench.report import SUBJECT, ReportRecord, Row, decibels, milliseconds
from benchmarks.bench.subjects import IMAGE_SEED, Inputs
from dipgo.base.files import new_file
from engines.pipeline.images import grid
from engines.pipeline.pipeline import load

FEWER = "fewer steps"
SIDE, LEFT, FONT = 96, 196, 17  # pixels: an image's side at least, the labels' width, their height


def picture(bundle: Path, report: ReportRecord, conditions: Inputs, path: Path) -> None:
    """Save three labelled rows of images from the same noise as PNG: full, dipgo, fewer plain steps.

    ``report``, on ``bundle``, gives times, PSNR and the number of plain steps; ``conditions`` are a class or prompt a
    column.
    """
    measured = {row.name: row for row in report.rows if row.timing}
    rows = [measured[name] for name in ("full", SUBJECT, FEWER) if name in measured]
    images = _images(bundle, conditions, [None if row.name == SUBJECT else row.steps for row in rows])
    scale = -(-SIDE // images.shape[2])
    pictures = grid(images.reshape(-1, *images.shape[2:]), columns=len(conditions))
    pictures = pictures.resize((pictures.width * scale, pictures.height * scale), resample=Image.Resampling.LANCZOS)
    canvas = Image.new("RGB", (LEFT + pictures.width, pictures.height), "white")
    canvas.paste(pictures, (LEFT, 0))
    draw, height = ImageDraw.Draw(canvas), pictures.height // len(rows)
    for number, row in enumerate(rows):
        middle = (8, number * height + height // 2)
        draw.text(middle, _label(row), "black", ImageFont.load_default(FONT), anchor="lm", spacing=6)
    path.parent.mkdir(exist_ok=True)
    with new_file(path) as draft:
        canvas.quantize(256).save(draft, format="PNG", optimize=True)


def _label(row: Row) -> str:
    assert row.timing
    name = f"{row.steps} plain steps" if row.name == FEWER else row.name
    lines = [f"{name}, {milliseconds(row.timing.wall.median)}", f"{row.timing.speedup.median:.1f} times as fast"]
    if row.name == "full":
        lines[1] = f"{row.steps} steps"
    elif row.quality:
        lines.append(f"{decibels(row.quality.psnr_db)} from full")
    return "\n".join(lines)


def _images(bundle: Path, conditions: Inputs, steps: Sequence[int | None]) -> np.ndarray:
    """Return images ``[rows, columns, height, width, channels]``: diffusers' in so many steps, or the program's."""
    import torch

    with load(bundle) as program:
        task = task_of(program.bundle, model_of(program.bundle, None))
        own = program.generate(list(conditions), IMAGE_SEED)
    task.pipe.set_progress_bar_config(disable=True)
    rows = [
        own
        if number is None
        else task.pipe(
            list(conditions),
            guidance_scale=task.guidance_scale,
            num_inference_steps=number,
            generator=torch.Generator().manual_seed(IMAGE_SEED),
            output_type="np",
        ).images
        for number in steps
    ]
    return np.stack(rows)
