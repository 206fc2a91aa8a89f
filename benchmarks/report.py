"""The report: what was measured, as JSON (schema ``dipgo.report/1``, published in ``schemas/report-1.json``).

``python -m benchmarks.report`` prints the JSON Schema; run it into that file when a record changes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from benchmarks.environment import Environment
from benchmarks.parity import Parity
from benchmarks.quality import CEILING_DB, Quality
from benchmarks.timing import Timing
from dipgo.records import ModelIdentity, Record, SamplerIdentity, read_record
from dipgo.subnet import Cost

SCHEMA: Literal["dipgo.report/1"] = "dipgo.report/1"
RECORD_FILE = "report.json"
Kind = Literal["loss", "result", "note"]
SUBJECT = "dipgo"  # the row of the bundle that the report is about


class Row(Record):
    """One program. What could not be measured is None, and ``error`` says why.

    ``macs`` are of one trajectory and one row of the denoiser's batch, of which guidance runs two, as in the SubNet.
    """

    name: str
    error: str | None = None
    steps: int | None = None
    launches: int | None = Field(default=None, description="of graphs, in one trajectory")
    graphs: int | None = None
    macs: int | None = None
    macs_ratio: float | None = Field(default=None, description="MACs over those of the full program")
    parity: Parity | None = None
    timing: Timing | None = None
    efficiency: float | None = Field(default=None, description="median speedup over 1 / macs_ratio")
    quality: Quality | None = None


class Headline(Record):
    """One of the report's first lines, computed from its rows."""

    kind: Kind
    line: str


class Memory(Record):
    """Bytes of the cache slots, of a cache that keeps every site's outputs, and of the bundle's files."""

    slots: int
    naive_cache: int
    files: dict[str, int]


class ReportRecord(Record):
    """``report.json``."""

    schema_id: Literal["dipgo.report/1"] = Field(alias="schema", default=SCHEMA)
    created: str = Field(description="ISO 8601, UTC")
    command: str
    seeds: dict[str, int]
    model: ModelIdentity
    sampler: SamplerIdentity
    search: str
    budget: float | None
    cost: Cost
    scope: str = Field(description="what the wall times span")
    rounds: int
    images: int
    headline: list[Headline]
    parity: Parity
    rows: list[Row] = Field(description="the full program, the bundle, the baselines")
    sites: list[str]
    gates: list[list[int]] = Field(description="[steps][sites], 1 = compute")
    memory: Memory
    environment: Environment

    def row(self, name: str) -> Row:
        """Return the row of that name."""
        return next(row for row in self.rows if row.name == name)


def headlines(
    model: ModelIdentity, sampler: SamplerIdentity, rows: Sequence[Row], scope: str, place: Environment
) -> list[Headline]:
    """Return the first lines: where the bundle loses to a baseline, what was measured, what to bear in mind.

    ``rows`` begin with the full program and the bundle, both measured.
    """
    full, own, *others = rows
    assert full.timing and own.timing and own.quality and own.macs_ratio is not None  # noqa: PT018 - for mypy
    assert own.efficiency is not None
    mine = own.quality.psnr_db
    judged = [(other.name, other.quality.psnr_db, other.macs_ratio or 0) for other in others if other.quality]
    judged.sort(key=lambda entry: -entry[1])
    losses = [
        f"Loses to '{name}' in PSNR: {decibels(mine)} against {decibels(theirs)}, with {own.macs_ratio:.1%} of the "
        f"MACs against {ratio:.1%}."
        for name, theirs, ratio in judged
        if theirs > mine
    ]
    best = ""
    if judged and not losses:
        best = f"; the next best at equal compute, '{judged[0][0]}', has {decibels(judged[0][1])}"
    speedup = own.timing.speedup
    ahead = [row for row in others if row.timing and row.timing.speedup.median > speedup.median]
    if ahead:
        rivals = ", ".join(f"'{row.name}' {row.timing.speedup.median:.2f}" for row in ahead if row.timing)
        losses.append(f"Loses in speed at equal MACs: {speedup.median:.2f} times the full program's, against {rivals}.")
    if speedup.median < 1:
        losses.append(f"Slower than the full program: {speedup.median:.2f} times its speed.")
    results = [
        f"{model.name}: {sampler.steps} steps of {sampler.class_name}, guidance {sampler.guidance_scale:g}, "
        f"{own.macs_ratio:.1%} of the MACs.",
        f"{speedup.median:.2f} times the speed of the full program, compiled the same way: "
        f"{milliseconds(own.timing.wall.median)} against {milliseconds(full.timing.wall.median)}, median of "
        f"{len(own.timing.samples)} interleaved rounds ({scope}; {place.cpu}). Paired ratio {speedup.p5:.2f} to "
        f"{speedup.p95:.2f} (p5 to p95); efficiency {own.efficiency:.2f}.",
        f"PSNR to the full program's images over {own.quality.images} images: {decibels(mine)}{best}.",
    ]
    notes = [f"Not measured: '{row.name}' ({row.error})." for row in others if row.error]
    if place.load_at_start[0] > place.cores / 4:
        notes.append(
            f"The machine was not idle: load average {place.load_at_start[0]:.1f} on {place.cores} cores at the start."
        )
    if model.weights_sha256 is None:
        notes.append("Random weights: images are meaningless.")
    kinds: dict[Kind, list[str]] = {"loss": losses, "result": results, "note": notes}
    return [Headline(kind=kind, line=line) for kind, lines in kinds.items() for line in lines]


def milliseconds(seconds: float, unit: bool = True) -> str:
    """Return a duration in milliseconds, with three figures or more."""
    value = seconds * 1e3
    text = f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
    return f"{text} ms" if unit else text


def decibels(value: float) -> str:
    """Return a PSNR as text; at the ceiling the images are identical."""
    return "identical" if value >= CEILING_DB else f"{value:.1f} dB"


def read_report(path: Path) -> ReportRecord:
    """Read and validate ``report.json``.

    Raises:
        DipgoError: a missing or damaged file, or another schema version.
    """
    return read_record(path, ReportRecord, SCHEMA, "report", "run 'dipgo bench' again")


def json_schema() -> str:
    """Return the JSON Schema of ``report.json``."""
    return json.dumps(ReportRecord.model_json_schema(by_alias=True), indent=2) + "\n"


if __name__ == "__main__":
    print(json_schema(), end="")
