"""A report as a short text table, for the terminal."""

from __future__ import annotations

from benchmarks.bench.page import macs
from benchmarks.bench.report import ReportRecord, decibels, milliseconds


def table(report: ReportRecord) -> str:
    """Return a line a program, then parity and scope."""
    lines: list[tuple[str, ...]] = [("program", "MACs", "wall time", "speedup", "PSNR", "class accuracy")]
    for row in report.rows:
        if row.timing is None:
            lines.append((row.name, f"not measured: {row.error}", "", "", "", ""))
            continue
        quality = row.quality
        accuracy = quality.class_accuracy if quality else None
        lines.append(
            (
                row.name,
                "not counted" if row.macs is None else macs(row.macs),
                milliseconds(row.timing.wall.median),
                f"{row.timing.speedup.median:.2f}",
                "reference"
                if row is report.rows[0]
                else "not judged"
                if quality is None
                else decibels(quality.psnr_db),
                "not judged" if accuracy is None else f"{accuracy:.1%}",
            )
        )
    return "\n".join([*aligned(lines), f"parity: {report.parity.line()}; wall time: {report.scope}"])


def aligned(lines: list[tuple[str, ...]]) -> list[str]:
    """Return lines of cells as columns, the first to the left; a line that has two cells alone goes its own way."""
    whole = [line for line in lines if line[2]]
    widths = [max(len(line[column]) for line in whole) for column in range(len(lines[0]))]
    widths[0] = max(len(line[0]) for line in lines)
    return [
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        if line[2]
        else f"{line[0].ljust(widths[0])}  {line[1]}"
        for line in lines
    ]
