"""README's table: what the committed results come to, in six rows."""

from __future__ import annotations

from pathlib import Path

from benchmarks.bench.report import SUBJECT, ReportRecord, Row, decibels, milliseconds, read_report
from dipgo.base.records import read_json

FEWER = "fewer steps"
REPORTS = {
    "emoji-sd-50-0.2": "emoji-sd, 2 CPU cores",
    "digits-dit-20-0.35": "digits-dit, 1 CPU thread",
    "sd15-cpu-sd-1.5-50-0.2": "SD-1.5, 2 CPU cores",
}
GPU, GPU_CASE = "gpu-h200", "sd-1.5/b1/eager/published"
HEAD = ("case", "program", "time", "full model", "speedup", "PSNR", "from")


def digest(results: Path, link: str) -> str:
    """Return the table: dipgo beside plain steps at equal MACs, and the published SubNet for speed alone.

    ``results`` is the folder of committed results, ``link`` its address in the page's links.
    """
    rows = []
    for stem, where in REPORTS.items():
        report = read_report(results / f"{stem}.json")
        subject, *plain = [row for row in report.rows if row.name in (SUBJECT, FEWER)]
        shown = [subject, *plain] if subject.quality else [subject]
        rows += [[f"{where}, {report.sampler.steps} steps", *_cells(report, row), stem] for row in shown]
    case = next(case for case in read_json(results / f"{GPU}.json", "result")["cases"] if case["name"] == GPU_CASE)
    own, full = (milliseconds(case[name]["wall"]["median"]) for name in ("candidate_figures", "baseline_figures"))
    program = f"published SubNet, {case['macs_ratio']:.0%} of the MACs"
    rows.append(
        [f"SD-1.5, H200, {case['calls']} steps", program, own, full, f"{case['speedup']['median']:.2f}", "", GPU]
    )
    lines = [[*cells, f"[{stem}]({link}/{stem}.json)"] for *cells, stem in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in (HEAD, ["---"] * len(HEAD), *lines))


def _cells(report: ReportRecord, row: Row) -> list[str]:
    """Return program, time, the full program's time, speedup and PSNR."""
    assert row.timing
    full = report.row("full").timing
    assert full
    name = "**dipgo**" if row.quality else "published SubNet"  # which has random weights: no images
    program = f"{name}, {row.macs_ratio:.0%} of the MACs" if row.name == SUBJECT else f"{row.steps} plain steps"
    return [
        program,
        milliseconds(row.timing.wall.median),
        milliseconds(full.wall.median),
        f"{row.timing.speedup.median:.2f}",
        decibels(row.quality.psnr_db) if row.quality else "",
    ]
