"""The report as a web page: one file that needs no network and no script."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from benchmarks.bench.baselines import FULL
from benchmarks.bench.plots import heatmap, pareto, points_of, step_bars
from benchmarks.bench.report import (
    PAGE_FILE,
    RECORD_FILE,
    REPORT,
    SUBJECT,
    SUMMARY_FILE,
    ReportRecord,
    Row,
    decibels,
    milliseconds,
)
from dipgo.base.files import new_folder
from engines.pipeline.images import to_image

SMALL = 128  # images with shorter sides are shown enlarged, pixel by pixel
LARGE = 256  # those with longer ones as thumbnails
SHOWN_SMALL, SHOWN = 16, 4  # images a program


@dataclass(frozen=True)
class Strip:
    """Images of one program, as PNG data URIs."""

    name: str
    images: list[str]


def write_report(
    report: ReportRecord,
    pictures: Mapping[str, np.ndarray],
    captions: Sequence[str],
    folder: Path,
    force: bool = False,
) -> None:
    """Write ``report.json``, ``report.html`` and ``report.md`` into ``folder``, whole or not at all.

    ``pictures`` are images ``[n, height, width, channels]`` in [0, 1] of the programs that made any, ``captions`` what
    each of them shows.

    Raises:
        UsageError: the folder exists, without ``force``, or is no report's.
    """
    size: Sequence[int] = next((images.shape[1:3] for images in pictures.values()), (SMALL, SMALL))
    shown = SHOWN_SMALL if min(size) < SMALL else SHOWN
    strips = [
        Strip(row.name, [_data_uri(image) for image in pictures[row.name][:shown]])
        for row in report.rows
        if row.name in pictures and not row.error
    ]
    with new_folder(folder, force, REPORT) as draft:
        (draft / RECORD_FILE).write_text(report.text())
        (draft / PAGE_FILE).write_text(render(report, strips, captions[:shown], size))
        (draft / SUMMARY_FILE).write_text(summary(report) + "\n")


def render(report: ReportRecord, strips: Sequence[Strip], captions: Sequence[str], size: Sequence[int]) -> str:
    """Return the page; ``size`` is the height and width of the images."""
    scale = max(1, round(64 / min(size))) if min(size) < SMALL else min(1.0, LARGE / max(size))
    full, own = report.row(FULL), report.row(SUBJECT)
    return template("report.html").render(
        report=report,
        full=FULL,
        subject=SUBJECT,
        strips=strips,
        captions=captions,
        small=min(size) < SMALL,
        height=round(size[0] * scale),
        width=round(size[1] * scale),
        map=Markup(heatmap(report.gates, report.sites, report.sampler.timesteps)),
        plot=Markup(pareto(report.rows)),
        points=points_of(report.rows),
        bars=Markup(step_bars(own.steps_seconds, full.steps_seconds)) if own.steps_seconds else None,
        pipelines=[row for row in report.rows if row.pipeline],
        used=[row for row in report.rows if row.usage],
        devices=any(row.device for row in report.rows),
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
    environment.filters |= {"ms": milliseconds, "db": decibels}
    environment.filters |= {"size": partial(scaled, units=_BYTES), "macs": partial(scaled, units=_MACS)}
    return environment.get_template(name)


_BYTES = {"GB": 1e9, "MB": 1e6, "kB": 1e3, "B": 0}
_MACS = {"T": 1e12, "G": 1e9, "M": 1e6, "": 0}


def scaled(count: int, units: Mapping[str, float]) -> str:
    """Return a number as text, in the first unit that it reaches; in the last, of 0, as it is."""
    unit, least = next((unit, least) for unit, least in units.items() if count >= least)
    return f"{count / least:.2f} {unit}" if least else f"{count} {unit}".rstrip()


def _data_uri(pixels: np.ndarray) -> str:
    image, stream = to_image(pixels), io.BytesIO()
    if max(image.size) > LARGE:
        image.thumbnail((LARGE, LARGE))
    image.save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


_COLUMNS = ("program", "MACs", "wall time", "speedup", "efficiency", "PSNR to full", "class accuracy")


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
    return [
        f"**{row.name}**" if row.name == SUBJECT else row.name,
        "" if row.macs_ratio is None else f"{row.macs_ratio:.1%}",
        milliseconds(row.timing.wall.median),
        f"{row.timing.speedup.median:.2f}",
        "" if row.efficiency is None else f"{row.efficiency:.2f}",
        "" if quality is None else "reference" if reference else decibels(quality.psnr_db),
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
