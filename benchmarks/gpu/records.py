"""``report.json`` of the GPU benchmark (schema ``dipgo.gpu/1``, published in ``gpu/schema.json``).

``python -m benchmarks.gpu.records`` prints the JSON Schema; run it into that file when a record changes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import Field

from benchmarks.bench.timing import Spread
from dipgo.base.records import Record, read_record

SCHEMA: Literal["dipgo.gpu/1"] = "dipgo.gpu/1"
RECORD_FILE = "report.json"
Status = Literal["measured", "failed", "skipped", "not reached"]


class Machine(Record):
    """Where a call of the command ran. Clocks are in MHz, power in W, memory in bytes; None where not to be had."""

    device: str
    cuda: bool
    driver: str | None
    compute_capability: str | None
    memory: int | None
    power_limit: float | None
    max_sm_clock: float | None
    cpu: str
    cores: int
    load_average: float
    python: str
    versions: dict[str, str]


class Call(Record):
    """One call of the command; ``seconds`` is how long it took, None while it runs or where it was cut off."""

    started: str = Field(description="ISO 8601, UTC")
    command: str
    commit: str | None
    machine: Machine
    seconds: float | None = None


class State(Record):
    """The device right after a case: SM clock in MHz, power in W, temperature in °C."""

    sm_clock: float | None
    power: float | None
    temperature: float | None


class Parity(Record):
    """Final latents against torch under the same gates, run by module, in the same dtype.

    Errors are ``||program - torch||_2 / ||torch||_2``. The tolerance is twice ``rounding``, torch's own error in this
    dtype against float32 from the same weights, of the first image, plus that of float32.
    """

    error: float
    rounding: float
    tolerance: float
    passed: bool

    def line(self) -> str:
        return f"relative error {self.error:.1e}, tolerance {self.tolerance:.1e}"


class Figures(Record):
    """One program of a pair. ``device`` is between CUDA events around the loop; ``wall`` is until the host knows.

    ``peak_bytes`` is the most device memory while the program was built and first run, its weights included.
    """

    wall: Spread
    device: Spread | None
    peak_bytes: int | None
    build_seconds: float


class CaseRecord(Record):
    """One pair. ``speedup`` are the rounds' own ratios, baseline over candidate, of wall times.

    ``macs`` are of one trajectory and image, guidance's second row included; ``efficiency`` is the median speedup over
    1 / ``macs_ratio``.
    """

    name: str
    model: str
    batch: int
    dtype: str
    backend: str
    program: str
    baseline: str
    ours: bool
    status: Status
    error: str | None = None
    call: int | None = Field(default=None, description="index of the call of the command that tried it")
    scope: str | None = None
    calls: int | None = Field(default=None, description="steps of the sampler")
    launches: int | None = Field(default=None, description="steps that run anything")
    signatures: int | None = None
    macs: int | None = None
    macs_ratio: float | None = None
    parity: Parity | None = None
    baseline_parity: Parity | None = None
    rounds: int | None = None
    candidate_figures: Figures | None = None
    baseline_figures: Figures | None = None
    speedup: Spread | None = None
    device_speedup: Spread | None = None
    efficiency: float | None = None
    state: State | None = None


class GpuReport(Record):
    """The whole file; cases stand in order of importance."""

    schema_id: Literal["dipgo.gpu/1"] = Field(alias="schema", default=SCHEMA)
    tiny: bool
    headline: list[str]
    calls: list[Call]
    cases: list[CaseRecord]


def read_gpu_report(path: Path) -> GpuReport:
    """Read and validate ``report.json``.

    Raises:
        DipgoError: a missing or damaged file, or another schema version.
    """
    return read_record(path, GpuReport, SCHEMA, "GPU report", "measure again into a new folder")


def json_schema() -> str:
    """Return the JSON Schema of ``report.json``."""
    return json.dumps(GpuReport.model_json_schema(by_alias=True), indent=2) + "\n"


if __name__ == "__main__":
    print(json_schema(), end="")
