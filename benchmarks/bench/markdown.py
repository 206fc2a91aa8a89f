"""A report as markdown: its first lines and one table, for pull requests and the README."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.bench.report import SUBJECT, ReportRecord, Row, decibels, milliseconds

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
