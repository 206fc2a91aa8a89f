"""A report as markdown: its first lines and one table, for pull requests and the README."""

from __future__ import annotations

from benchmarks.report import SUBJECT, ReportRecord, Row, decibels, milliseconds

_COLUMNS = ("program", "MACs", "wall time", "speedup", "efficiency", "PSNR to full", "class accuracy")


def summary(report: ReportRecord, source: str = "") -> str:
    """Return the report's table with the lines that say what was measured on what; ``source`` is the JSON's path."""
    judged = any(row.quality for row in report.rows)
    columns = [*_COLUMNS[:5], *_COLUMNS[5:] * judged]
    lines = [f"- {headline.line}" for headline in report.headline]
    lines += ["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [f"| {' | '.join(_cells(row, len(columns)))} |" for row in report.rows]
    place = report.environment
    images = f", {report.images} images" if judged else ""
    lines += [
        "",
        f"`{report.command}`, {report.rounds} interleaved rounds{images}; {report.scope}; {place.cpu}, {place.cores} "
        f"cores; parity {report.parity.relative_error_image:.1e}." + (f" From [{source}]({source})." if source else ""),
    ]
    return "\n".join(lines)


def _cells(row: Row, count: int) -> list[str]:
    if row.error or row.timing is None:
        return [row.name, f"not measured: {row.error}", *[""] * (count - 2)]
    cells = [
        f"**{row.name}**" if row.name == SUBJECT else row.name,
        "" if row.macs_ratio is None else f"{row.macs_ratio:.1%}",
        milliseconds(row.timing.wall.median),
        f"{row.timing.speedup.median:.2f}",
        "" if row.efficiency is None else f"{row.efficiency:.2f}",
    ]
    if count > len(cells):
        quality = row.quality
        accuracy = "" if quality is None or quality.class_accuracy is None else f"{quality.class_accuracy:.1%}"
        reference = row.macs_ratio == 1 and quality is not None and row.agreement is None
        cells += ["" if quality is None else "reference" if reference else decibels(quality.psnr_db), accuracy]
    return cells
