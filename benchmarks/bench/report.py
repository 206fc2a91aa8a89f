"""The report: what was measured, as JSON (schema ``dipgo.report/1``, published in ``schemas/report-1.json``).

``python -m benchmarks.bench.report`` prints the JSON Schema; run it into that file when a record changes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import Field

from benchmarks.bench.parity import Parity
from benchmarks.bench.quality import CEILING_DB, Quality
from benchmarks.bench.scales import ScaleQuality
from benchmarks.bench.suite import Suite
from benchmarks.bench.timing import Spread, Timing
from benchmarks.environment import Environment
from dipgo.base.files import Kind
from dipgo.base.records import ModelIdentity, Record, SamplerIdentity, read_record
from dipgo.schedule.subnet import Cost

SCHEMA: Literal["dipgo.report/1"] = "dipgo.report/1"
RECORD_FILE = "report.json"
PAGE_FILE, SUMMARY_FILE, PICTURE_FILE = "report.html", "report.md", "picture.png"
REPORT = Kind(RECORD_FILE, lambda folder: (PAGE_FILE, SUMMARY_FILE, PICTURE_FILE))
Tone = Literal["loss", "result", "note"]
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
    about: str | None = Field(default=None, description="what it is, where its name does not say")
    curve: str | None = Field(default=None, description="of what it is one point: a solver's steps, or budgets")
    runs_on: str | None = Field(default=None, description="backend, device, threads")
    steps: int | None = None
    launches: int | None = Field(default=None, description="of graphs, in one trajectory")
    graphs: int | None = None
    macs: int | None = None
    macs_ratio: float | None = Field(default=None, description="MACs over those of the full program")
    parity: Parity | None = None
    agreement: float | None = Field(default=None, description="relative error of an exact baseline to the full program")
    timing: Timing | None = None
    over_eager: Spread | None = Field(default=None, description="of a technique in torch, speedup over plain torch")
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
    scales: list[ScaleQuality] = Field(
        default_factory=list, description="the bundle at other guidance scales than the search's, beside that one"
    )
    sites: list[str]
    gates: list[list[int]] = Field(description="[steps][sites], 1 = compute")
    memory: Memory
    environment: Environment
    suite: str | None = Field(default=None, description="name of the suite")
    settings: Suite | None = None
    search_seconds: float | None = Field(default=None, description="that the search took, on its machine")

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
