"""The report: what was measured, as JSON (schema ``dipgo.report/1``, published in ``schemas/report-1.json``).

``python -m benchmarks.bench.report`` prints the JSON Schema; run it into that file when a record changes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from benchmarks.bench.parity import Parity
from benchmarks.bench.quality import CEILING_DB, Quality
from benchmarks.bench.suite import Suite
from benchmarks.bench.timing import Spread, Timing
from benchmarks.environment import Environment
from dipgo.base.files import Kind
from dipgo.base.records import ModelIdentity, Record, SamplerIdentity, read_record
from dipgo.schedule.subnet import Cost

SCHEMA: Literal["dipgo.report/1"] = "dipgo.report/1"
RECORD_FILE = "report.json"
PAGE_FILE, SUMMARY_FILE = "report.html", "report.md"
REPORT = Kind(RECORD_FILE, lambda folder: (PAGE_FILE, SUMMARY_FILE))
Tone = Literal["loss", "result", "note"]
EQUAL = 1.1  # a baseline with up to so many times the bundle's MACs is one at equal compute
POOR = 0.5  # an efficiency below this says that the program, not its schedule, is slow
SUBJECT = "dipgo"  # the row of the bundle that the report is about


class Usage(Record):
    """What a program takes, each in a process of its own.

    Attributes:
        build_seconds: compiling the bundle; None for the bundle itself, which came compiled, and for torch.
        load_seconds, first_seconds: median over the processes, of loading and of the first run of the loop.
        resident_peak: bytes of memory at their peak.
        proportional_peak: the same with shared pages divided by those who share them, the largest seen between runs.
        device_peak: bytes that torch reserved on the device.
        disk: bytes of all its files.
    """

    build_seconds: float | None
    load_seconds: float
    first_seconds: float
    resident_peak: int
    proportional_peak: int
    device_peak: int | None = None
    disk: int


class Row(Record):
    """One program. What could not be measured is None, and ``error`` says why.

    ``macs`` are of one trajectory and one row of the denoiser's batch, of which guidance runs two, as in the SubNet.
    ``timing`` is of the denoising loop, ``pipeline`` of all from classes or prompts to images; the ``speedup`` of both
    is over the full program. ``steps_seconds`` are medians, a step each.
    """

    name: str
    error: str | None = None
    runs_on: str | None = Field(default=None, description="backend, device, threads")
    steps: int | None = None
    launches: int | None = Field(default=None, description="of graphs, in one trajectory")
    graphs: int | None = None
    macs: int | None = None
    macs_ratio: float | None = Field(default=None, description="MACs over those of the full program")
    parity: Parity | None = None
    agreement: float | None = Field(default=None, description="relative error of an exact baseline to the full program")
    timing: Timing | None = None
    pipeline: Timing | None = None
    device: Spread | None = Field(default=None, description="seconds of the loop on the device itself")
    outside: Spread | None = Field(default=None, description="share of the loop's wall time outside the graphs")
    steps_seconds: list[float] | None = None
    efficiency: float | None = Field(default=None, description="median speedup over 1 / macs_ratio")
    usage: Usage | None = None
    quality: Quality | None = None
    skipped: dict[str, str] = Field(default_factory=dict, description="scopes that it does not have, and why")


class Headline(Record):
    """One of the report's first lines, computed from its rows."""

    kind: Tone
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
    suite: str | None = Field(default=None, description="name of the suite")
    settings: Suite | None = None

    def row(self, name: str) -> Row:
        """Return the row of that name."""
        return next(row for row in self.rows if row.name == name)


def milliseconds(seconds: float, unit: bool = True) -> str:
    """Return a duration in milliseconds, with three figures or more; with its unit, from ten seconds on in these."""
    if unit and seconds >= 10:
        return f"{seconds:.1f} s"
    value = seconds * 1e3
    text = f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
    return f"{text} ms" if unit else text


def decibels(value: float) -> str:
    """Return a PSNR as text; at the ceiling the images are identical."""
    return "identical" if value >= CEILING_DB else f"{value:.1f} dB"


def headlines(
    model: ModelIdentity, sampler: SamplerIdentity, rows: Sequence[Row], scope: str, place: Environment
) -> list[Headline]:
    """Return the first lines: where the bundle loses to a baseline, what was measured, what to bear in mind.

    ``rows`` begin with the full program and the bundle, both timed.
    """
    full, own, *others = rows
    assert full.timing and own.timing and own.macs_ratio is not None  # noqa: PT018 - for mypy
    assert own.efficiency is not None
    speedup = own.timing.speedup
    limit = own.macs_ratio * EQUAL
    equal = [row for row in others if row.macs_ratio is not None and row.macs_ratio <= limit]
    losses = _losses(own, equal, [row for row in others if row not in equal])
    results = [
        f"{model.name}: {sampler.steps} steps of {sampler.class_name}, guidance {sampler.guidance_scale:g}, "
        f"{own.macs_ratio:.1%} of the MACs.",
        f"{speedup.median:.2f} times the speed of the full program, compiled the same way: "
        f"{milliseconds(own.timing.wall.median)} against {milliseconds(full.timing.wall.median)}, "
        f"{_rounds(own.timing)}; {scope}; {place.cpu}; efficiency {own.efficiency:.2f}.",
    ]
    if own.quality:
        judged = [(row.quality.psnr_db, row.name) for row in equal if row.quality]
        best = ""
        if judged and max(judged)[0] <= own.quality.psnr_db:
            best = f"; the next best at equal compute, '{max(judged)[1]}', has {decibels(max(judged)[0])}"
        results.append(
            f"PSNR to the full program's images over {own.quality.images} images: "
            f"{decibels(own.quality.psnr_db)}{best}."
        )
    kinds: dict[Tone, list[str]] = {"loss": losses, "result": results, "note": _notes(model, rows, place)}
    return [Headline(kind=kind, line=line) for kind, lines in kinds.items() for line in lines]


def _rounds(timing: Timing) -> str:
    """Return how often a time was taken, and how far the rounds' ratios lie apart."""
    if len(timing.samples) == 1:
        return "one run of each"
    speedup = timing.speedup
    return (
        f"median of {len(timing.samples)} interleaved rounds (their ratios {speedup.p5:.2f} to {speedup.p95:.2f}, "
        "p5 to p95)"
    )


def _losses(own: Row, equal: Sequence[Row], others: Sequence[Row]) -> list[str]:
    """Return where the bundle loses: in PSNR or speed at equal MACs, in speed to any other, to the full program."""
    assert own.timing and own.macs_ratio is not None and own.efficiency is not None  # noqa: PT018 - for mypy
    speedup, losses = own.timing.speedup.median, []
    if own.quality:
        mine = own.quality.psnr_db
        better = [(row.quality.psnr_db, row) for row in equal if row.quality and row.quality.psnr_db > mine]
        losses += [
            f"Loses to '{row.name}' in PSNR: {decibels(mine)} against {decibels(theirs)}, with {own.macs_ratio:.1%} of "
            f"the MACs against {row.macs_ratio or 0:.1%}."
            for theirs, row in sorted(better, key=lambda entry: -entry[0])
        ]
        for row in others:
            if row.quality and row.timing and row.quality.psnr_db > mine and row.timing.speedup.median > speedup:
                losses.append(
                    f"Loses to '{row.name}' in speed and PSNR: {speedup:.2f} times the full program's and "
                    f"{decibels(mine)}, against {row.timing.speedup.median:.2f} and {decibels(row.quality.psnr_db)}."
                )
    for ahead, where in ((_faster(equal, speedup), "speed at equal MACs"), (_faster(others, speedup), "speed")):
        if ahead:
            rivals = ", ".join(f"'{row.name}' {row.timing.speedup.median:.2f}" for row in ahead if row.timing)
            losses.append(f"Loses in {where}: {speedup:.2f} times the full program's, against {rivals}.")
    if speedup < 1:
        losses.append(f"Slower than the full program: {speedup:.2f} times its speed.")
    if own.efficiency < POOR:
        losses.append(
            f"Efficiency {own.efficiency:.2f}: {own.macs_ratio:.1%} of the MACs take "
            f"{1 / speedup:.1%} of the full program's time."
        )
    return losses


def _faster(rows: Sequence[Row], speedup: float) -> list[Row]:
    return [row for row in rows if row.timing and row.timing.speedup.median > speedup]


def _notes(model: ModelIdentity, rows: Sequence[Row], place: Environment) -> list[str]:
    notes = [f"Not measured: '{row.name}' ({row.error})." for row in rows if row.error]
    if place.load_at_start[0] > place.cores / 4:
        notes.append(
            f"The machine was not idle: load average {place.load_at_start[0]:.1f} on {place.cores} cores at the start."
        )
    if model.weights_sha256 is None:
        notes.append("Random weights: images are meaningless.")
    return notes


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
