"""The report as a web page: one file that needs no network and no script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from benchmarks.bench.baselines import FULL
from benchmarks.bench.plots import curves_of, heatmap, points_of, step_bars, trade
from benchmarks.bench.report import (
    PAGE_FILE,
    PICTURE_FILE,
    RECORD_FILE,
    REPORT,
    SUBJECT,
    SUMMARY_FILE,
    ReportRecord,
    Row,
    decibels,
    milliseconds,
)
from benchmarks.bench.strips import GAIN, LARGE, SMALL, Strip, picture, save, shown, strips_of
from dipgo.base import units
from dipgo.base.files import new_folder


def write_report(
    report: ReportRecord,
    pictures: Mapping[str, np.ndarray],
    captions: Sequence[str],
    folder: Path,
    force: bool = False,
) -> None:
    """Write ``report.json``, ``report.html``, ``report.md`` and ``picture.png`` into ``folder``, whole or not at all.

    ``pictures`` are images ``[n, height, width, channels]`` in [0, 1] of the programs that made any, ``captions`` what
    each of them shows. Without any there is no ``picture.png``.

    Raises:
        UsageError: the folder exists, without ``force``, or is no report's.
    """
    first = next(iter(pictures.values()), np.zeros((0, SMALL, SMALL, 1)))
    size = first.shape[1:3]
    chosen, worst = shown(report.rows, len(first), size)
    names = [f"worst of {len(first)}: {captions[each]}" if each == worst else captions[each] for each in chosen]
    drawn = picture(report.rows, pictures, chosen)
    with new_folder(folder, force, REPORT) as draft:
        (draft / RECORD_FILE).write_text(report.text())
        (draft / PAGE_FILE).write_text(render(report, strips_of(report.rows, pictures, chosen), names, size))
        (draft / SUMMARY_FILE).write_text(summary(report) + "\n")
        if drawn:
            save(drawn, draft / PICTURE_FILE)


def render(report: ReportRecord, strips: Sequence[Strip], captions: Sequence[str], size: Sequence[int]) -> str:
    """Return the page; ``size`` is the height and width of the images."""
    scale = max(1, round(64 / min(size))) if min(size) < SMALL else min(1.0, LARGE / max(size))
    full, own = report.row(FULL), report.row(SUBJECT)
    points = points_of(report.rows)
    return template("report.html").render(
        report=report,
        full=FULL,
        subject=SUBJECT,
        timed_rows=sorted((row for row in report.rows if row.timing), key=lambda row: row.timing.wall.median),
        strips=strips,
        gain=GAIN,
        captions=captions,
        small=min(size) < SMALL,
        height=round(size[0] * scale),
        width=round(size[1] * scale),
        map=Markup(heatmap(report.gates, report.sites, report.sampler.timesteps)),
        plot=Markup(trade(report.rows)),
        points=points,
        curves=curves_of(points),
        bars=Markup(step_bars(own.steps_seconds, full.steps_seconds)) if own.steps_seconds else None,
        pipelines=[row for row in report.rows if row.pipeline],
        used=[row for row in report.rows if row.usage],
        devices=any(row.device for row in report.rows),
        eager=any(row.over_eager for row in report.rows),
    )


def template(name: str) -> Template:
    """Return a page's template, with the filters that print figures."""
    environment = Environment(
        loader=PackageLoader("benchmarks"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"ms": milliseconds, "db": decibels, "size": units.size, "macs": units.large}
    return environment.get_template(name)


_COLUMNS = ("program", "wall time", "speedup", "PSNR to full", "worst image", "MACs", "efficiency", "class accuracy")


def summary(report: ReportRecord, source: str = "") -> str:
    """Return the report's table with the lines that say what was measured on what; ``source`` is the JSON's path.

    A column that no program fills is left out.
    """
    cells = [_cells(row) for row in report.rows]
    filled = [any(row[column] for row in cells if len(row) > 2) for column in range(len(_COLUMNS))]
    lines = [f"- {headline.line}" for headline in report.headline]
    lines += ["", _line(_COLUMNS, filled), "|---" * sum(filled) + "|"]
    lines += [_line(row, filled) for row in cells]
    place = report.environment
    rounds = "one run of each" if report.rounds == 1 else f"{report.rounds} interleaved rounds"
    images = f", {report.images} images" if any(row.quality for row in report.rows) else ""
    lines += [
        "",
        f"`{report.command}`, {rounds}{images}; {report.scope}; {place.cpu}, {place.cores} "
        f"cores; parity {report.parity.relative_error_image:.1e}." + (f" From [{source}]({source})." if source else ""),
    ]
    return "\n".join(lines)


def _line(cells: Sequence[str], filled: Sequence[bool]) -> str:
    padded = [*cells, *[""] * (len(filled) - len(cells))]
    return f"| {' | '.join(cell for cell, shown in zip(padded, filled, strict=True) if shown)} |"


def _cells(row: Row) -> list[str]:
    """Return a cell a column, or two where the program was not measured."""
    if row.error or row.timing is None:
        return [row.name, f"not measured: {row.error}"]
    quality = row.quality
    accuracy = "" if quality is None or quality.class_accuracy is None else f"{quality.class_accuracy:.1%}"
    reference = row.macs_ratio == 1 and quality is not None and row.agreement is None
    name = row.name if row.about is None else f"{row.name}: {row.about}"
    each = quality.each_psnr_db if quality and not reference else []
    return [
        f"**{name}**" if row.name == SUBJECT else name,
        milliseconds(row.timing.wall.median),
        f"{row.timing.speedup.median:.2f}",
        "" if quality is None else "reference" if reference else decibels(quality.psnr_db),
        decibels(min(each)) if each else "",
        "" if row.macs_ratio is None else f"{row.macs_ratio:.1%}",
        "" if row.efficiency is None else f"{row.efficiency:.2f}",
        accuracy,
    ]


def table(report: ReportRecord) -> str:
    """Return the summary's table as columns of text, then parity and scope."""
    lines = [_COLUMNS, *([cell.strip("*") for cell in _cells(row)] for row in report.rows)]
    return "\n".join([*aligned(lines), f"parity: {report.parity.line()}; wall time: {report.scope}"])


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Return lines of cells as columns, the first to the left; a line that has two cells alone goes its own way."""
    whole = [line for line in lines if any(line[2:])]
    first, *widths = (max(map(len, cells)) for cells in zip(*whole, strict=True))
    first = max(first, *(len(line[0]) for line in lines))
    padded = [map(str.rjust, line[1:], widths) if line in whole else line[1:] for line in lines]
    return ["  ".join([line[0].ljust(first), *cells]).rstrip() for line, cells in zip(lines, padded, strict=True)]
