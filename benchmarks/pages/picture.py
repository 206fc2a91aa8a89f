"""The picture of a report: images of the full model, of the bundle, and of as many plain steps as take as long."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.bench.reference import model_of, task_of
from benchmarks.bench.report import SUBJECT, ReportRecord
from benchmarks.bench.strips import label, labelled, save
from benchmarks.bench.subjects import IMAGE_SEED, Inputs
from dipgo.base.files import new_file
from engines.pipeline.pipeline import load

FEWER = "fewer steps"


def picture(bundle: Path, report: ReportRecord, conditions: Inputs, path: Path) -> None:
    """Save three labelled rows of images from the same noise as PNG: full, dipgo, fewer plain steps.

    ``report``, on ``bundle``, gives times, PSNR and the number of plain steps; ``conditions`` are a class or prompt a
    column.
    """
    measured = {row.name: row for row in report.rows if row.timing}
    rows = [measured[name] for name in ("full", SUBJECT, FEWER) if name in measured]
    images = _images(bundle, conditions, [None if row.name == SUBJECT else row.steps for row in rows])
    drawn = labelled({label(row): made for row, made in zip(rows, images, strict=True)})
    path.parent.mkdir(exist_ok=True)
    with new_file(path) as draft:
        if drawn:
            save(drawn, draft)


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
