"""What a table of searches holds, and how it is written down."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from benchmarks.bench.quality import bootstrap_mean
from benchmarks.studies.study import StudyRecord
from dipgo.base.records import ModelIdentity, Record, SamplerIdentity

CONVERGED_STEPS = 500
BEST, PAPER, DIPGO = "best fixed policy of all", "the paper's method", "**dipgo**"


class Cell(Record):
    """One row at one budget.

    ``psnr_db``: over all pixels together, to the full trajectory. ``image_psnr_db``: mean of the images' own, which are
    ``each_psnr_db``, and ``ssim`` that of their structural similarity. ``converged_db``: as ``psnr_db``, to 500 steps
    of DDIM, or of a flow's own solver, on the first images. ``what``: the schedule, where the row has several: the one
    of the highest ``psnr_db``, while the other figures are the highest of any.
    """

    row: str
    budget: float
    macs_ratio: float
    psnr_db: float
    image_psnr_db: float
    ssim: float | None = None
    converged_db: float | None
    class_accuracy: float | None
    each_psnr_db: list[float] = Field(default_factory=list)
    what: str = ""
    search_seconds: float | None = None


class TableRecord(StudyRecord):
    """The result file; ``prompts`` is how many different ones the judged images are of, 0 for classes."""

    model: ModelIdentity
    sampler: SamplerIdentity
    images: int
    converged_images: int
    prompts: int = 0
    full_class_accuracy: float | None
    full_converged_db: float | None
    cells: list[Cell]


def markdown(record: TableRecord, source: str) -> str:
    """Return the table: a row a method, a column a budget, PSNR to the full trajectory (and to the converged one).

    Both over all pixels, where the worst images decide, and as the mean of the images' own. Last, what dipgo is ahead
    by in the mean, with the bootstrap 95 % interval over images.
    """
    budgets = sorted({cell.budget for cell in record.cells}, reverse=True)
    rows = list(dict.fromkeys(cell.row for cell in record.cells))
    by_place = {(cell.row, cell.budget): cell for cell in record.cells}
    solver = "the same" if record.sampler.class_name.startswith("FlowMatch") else "DDIM"
    lines = [
        f"PSNR in dB to the full {record.sampler.steps}-step {record.sampler.class_name.removesuffix('Scheduler')} "
        f"trajectory, guidance {record.sampler.guidance_scale:g}, over all pixels / in the mean of the images' own"
        + (", and their SSIM" if any(cell.ssim is not None for cell in record.cells) else "")
        + f", of {record.images} held-out pairs of noise and "
        + (f"prompt, of {record.prompts} prompts" if record.prompts else "class")
        + (
            f"; in brackets over all pixels to {CONVERGED_STEPS} steps of {solver}, of {record.converged_images}"
            if record.converged_images
            else ""
        )
        + (f" (the full trajectory itself: {record.full_converged_db:.1f})" if record.full_converged_db else "")
        + (
            f"; class accuracy of the images after the bar (full: {record.full_class_accuracy:.1%})."
            if record.full_class_accuracy is not None
            else "."
        ),
        "",
        "| at equal MACs | " + " | ".join(f"budget {budget:g}" for budget in budgets) + " |",
        "|---" * (len(budgets) + 1) + "|",
    ]
    for row in rows:
        texts = [_text(by_place.get((row, budget))) for budget in budgets]
        lines.append(f"| {row} | " + " | ".join(texts) + " |")
    lines += _leads(record, budgets, by_place)
    place = record.environment
    seconds = [cell.search_seconds for cell in record.cells if cell.row == DIPGO and cell.search_seconds]
    lines += [
        "",
        f"`{record.command}`; {place.cpu}, {place.cores} cores"
        + (f"; searches took {', '.join(f'{value / 60:.0f}' for value in seconds)} minutes" if seconds else "")
        + f". From [{source}]({source}).",
    ]
    return "\n".join(lines)


def _leads(record: TableRecord, budgets: list[float], by_place: dict[tuple[str, float], Cell]) -> list[str]:
    """Return rows of what dipgo is ahead by, in the mean over the same images, with its 95 % interval."""
    rows = []
    for other in (BEST, PAPER):
        pairs = [(by_place.get((DIPGO, budget)), by_place.get((other, budget))) for budget in budgets]
        leads = [_lead(ours.each_psnr_db, theirs.each_psnr_db) if ours and theirs else "" for ours, theirs in pairs]
        if any(leads):
            rows.append(f"| dipgo over {other}, in the mean | " + " | ".join(leads) + " |")
    return rows


def _lead(ours: list[float], theirs: list[float]) -> str:
    if not ours or len(ours) != len(theirs):
        return ""
    ahead = np.array(ours) - np.array(theirs)
    low, high = bootstrap_mean(ahead)
    return f"{ahead.mean():.1f} ({low:.1f} to {high:.1f})"


def _text(cell: Cell | None) -> str:
    if cell is None:
        return ""
    close = f" ({cell.converged_db:.1f})" if cell.converged_db is not None else ""
    accuracy = f" \\| {cell.class_accuracy:.1%}" if cell.class_accuracy is not None else ""
    similar = f", {cell.ssim:.3f}" if cell.ssim is not None else ""
    return f"{cell.psnr_db:.1f} / {cell.image_psnr_db:.1f}{similar}{close}{accuracy}"
