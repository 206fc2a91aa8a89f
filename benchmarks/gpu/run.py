"""The parent: hands cases to workers, keeps the limits, and writes the report after every case."""

from __future__ import annotations

import json
import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.cases import Case, Workload, cases, workloads
from benchmarks.gpu.machine import commit, machine
from benchmarks.gpu.page import headlines, markdown
from benchmarks.gpu.records import RECORD_FILE, Call, CaseRecord, GpuReport, read_gpu_report
from benchmarks.gpu.worker import Request, blank
from dipgo.base.errors import DipgoError, UsageError
from dipgo.base.files import new_file
from engines.backends import BACKENDS, DEFAULT

PAGE_FILE, LOG_FILE = "report.md", "log"
NOT_REACHED = "the time limit came first"


@dataclass(frozen=True)
class Options:
    """How the command runs.

    Attributes:
        only: patterns of case names; None for all.
        seconds: after which nothing more is begun and what runs is cut off.
        case_seconds: after which a case is given up.
        tiny: small configurations, to try the command.
        repeats, pair_seconds: rounds of a pair, see :func:`benchmarks.gpu.clock.time_pair`.
    """

    only: str | None = None
    seconds: float = 520.0
    case_seconds: float = 150.0
    tiny: bool = False
    repeats: int = 10
    pair_seconds: float = 10.0


class Journal:
    """The report under way, in order of importance; every change is on disk at once, whole."""

    def __init__(self, folder: Path, planned: Sequence[Case], options: Options, before: GpuReport | None) -> None:
        self.folder, self.tiny = folder, options.tiny
        call = Call(
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            command="python -m benchmarks.gpu " + shlex.join(sys.argv[1:]),
            commit=commit(),
            machine=machine(torch.cuda.is_available()),
        )
        self.calls = [*(before.calls if before else []), call]
        known = {record.name: record for record in before.cases} if before else {}
        fresh = {case.name: known.get(case.name) or _pending(case) for case in planned}
        self.records = {**known, **fresh}
        ordered = [case.name for case in cases(workloads(options.tiny, call.machine.cuda), engines_for())]
        self.records = {name: self.records[name] for name in sorted(self.records, key=_place(ordered))}
        self.write()

    def put(self, record: CaseRecord) -> None:
        """Take a case's record and write the report."""
        self.records[record.name] = record.model_copy(update={"call": len(self.calls) - 1})
        self.write()

    def finish(self, seconds: float) -> GpuReport:
        """Note how long the call took and write the report."""
        self.calls[-1] = self.calls[-1].model_copy(update={"seconds": seconds})
        return self.write()

    def write(self) -> GpuReport:
        records = list(self.records.values())
        report = GpuReport(
            tiny=self.tiny, headline=headlines(records, self.calls, self.tiny), calls=self.calls, cases=records
        )
        for name, text in ((RECORD_FILE, report.text()), (PAGE_FILE, markdown(report))):
            with new_file(self.folder / name) as draft:
                draft.write_text(text)
        return report


def run(folder: Path, options: Options, resume: bool = False) -> GpuReport:
    """Measure into ``folder``; with ``resume`` what it holds already is kept.

    What failed or was skipped is tried again on resuming, after what was never reached.

    Raises:
        UsageError: a folder that holds a report without ``resume``, or the reverse; patterns that match no case.
        DipgoError: a report that cannot be read, or one of the other size of models.
    """
    started = time.monotonic()
    file = folder / RECORD_FILE
    if resume and not file.is_file():
        raise UsageError(f"{folder}: no {RECORD_FILE} in it to go on from; give -o instead of --resume")
    if file.exists() and not resume:
        raise UsageError(f"{folder} holds a report; give --resume {folder} to go on, or another folder")
    before = read_gpu_report(file) if resume else None
    if before and before.tiny != options.tiny:
        raise DipgoError(f"{folder}: measured {'with' if before.tiny else 'without'} --tiny; go on in the same way")
    planned = cases(workloads(options.tiny, torch.cuda.is_available()), engines_for(), options.only)
    if not planned:
        raise UsageError(f"--only '{options.only}' matches no case; such as sd-1.5/b1/cuda-graph/published")
    folder.mkdir(parents=True, exist_ok=True)
    journal = Journal(folder, planned, options, before)
    status = {name: record.status for name, record in journal.records.items()}
    first = [case for case in planned if status[case.name] == "not reached"]
    again = [case for case in planned if status[case.name] in ("failed", "skipped")] if resume else []
    with _interrupted_by_term():
        for workload, group in groupby([*first, *again], key=lambda case: case.workload):
            _measure(workload, list(group), journal, options, started + options.seconds)
    return journal.finish(time.monotonic() - started)


def engines_for() -> list[str]:
    """Return the backends of dipgo that are tried: on a GPU those for GPUs, else two that need none."""
    if not torch.cuda.is_available():
        return [name for name in (DEFAULT, "torch") if name in BACKENDS]
    ready = [name for name in ("onnxruntime-cuda", "tensorrt", "torch") if name in BACKENDS]
    return [*ready, *(name for name in BACKENDS if name not in (DEFAULT, *ready) and not name.endswith("-cpu"))]


def _measure(workload: Workload, group: list[Case], journal: Journal, options: Options, deadline: float) -> None:
    """Have a workload's cases measured; a worker that dies or hangs costs the case it was at, and another goes on."""
    log = journal.folder / LOG_FILE
    left = list(group)
    while left and time.monotonic() < deadline:
        pairs = [(case.backend, case.program, case.baseline) for case in left]
        request = Request(workload, pairs, options.tiny, options.repeats, options.pair_seconds)
        running: str | None = None
        error, count = "", len(left)
        with _worker(request, log) as (messages, process):
            while left:
                patience = min(options.case_seconds, deadline - time.monotonic())
                try:
                    message = messages.get(timeout=max(0.0, patience))
                except queue.Empty:
                    if time.monotonic() >= deadline:
                        return
                    error = f"took longer than {options.case_seconds:g} s"
                    break
                if message is None:
                    error = f"its process ended with code {process.wait()}; {log.name} says more"
                    break
                if "begin" in message:
                    running = message["begin"]
                else:
                    record = CaseRecord.model_validate(message["case"])
                    journal.put(record)
                    left = [case for case in left if case.name != record.name]
                    running = None
        lost = [case for case in left if case.name == running]
        if running is None and len(left) == count:  # the model itself could not be had
            lost = left
        for case in lost:
            journal.put(blank(case, status="failed", error=error))
        left = [case for case in left if case not in lost]


@contextmanager
def _worker(request: Request, log: Path) -> Iterator[tuple[queue.Queue[Any], subprocess.Popen[str]]]:
    """Start a worker; yields its messages, None after the last, and the process. On leaving it is ended."""
    with log.open("a") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu.worker", request.text()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stream,
            text=True,
            start_new_session=True,
        )
    messages: queue.Queue[Any] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            messages.put(json.loads(line))
        messages.put(None)

    threading.Thread(target=read, daemon=True).start()
    try:
        yield messages, process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # compilers that it started too
        process.wait()


@contextmanager
def _interrupted_by_term() -> Iterator[None]:
    """Let a polite end (SIGTERM) unwind like Ctrl-C, so that the worker goes too."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _pending(case: Case) -> CaseRecord:
    return blank(case, status="not reached", error=NOT_REACHED)


def _place(ordered: Sequence[str]) -> Any:
    places = {name: number for number, name in enumerate(ordered)}
    return lambda name: places.get(name, len(places))
