"""Measures the cases of one workload in a process of its own; what it finds goes to the parent, a line of JSON a case.

``python -m benchmarks.gpu.worker REQUEST``, with the request as JSON. It ends with the parent: when standard input
closes.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from benchmarks.bench.baselines import one_line
from benchmarks.bench.timing import paired, spread
from benchmarks.gpu.bundles import Bundles
from benchmarks.gpu.cases import EAGER, FULL, Case, Workload
from benchmarks.gpu.clock import Samples, time_pair
from benchmarks.gpu.ground import prepare_ground
from benchmarks.gpu.machine import state
from benchmarks.gpu.parity import Reference
from benchmarks.gpu.programs import Built, Programs, Unavailable
from benchmarks.gpu.records import CaseRecord, Figures, Parity


@dataclass(frozen=True)
class Request:
    """What a worker is to do; ``repeats`` and ``seconds`` are of one pair."""

    workload: Workload
    pairs: list[tuple[str, str, str]]
    tiny: bool
    repeats: int
    seconds: float

    def cases(self) -> list[Case]:
        return [Case(self.workload, *pair) for pair in self.pairs]

    def text(self) -> str:
        return json.dumps(asdict(self))


def request_from(text: str) -> Request:
    """Read back what :meth:`Request.text` wrote."""
    found = json.loads(text)
    return Request(
        workload=Workload(**found.pop("workload")), pairs=[tuple(pair) for pair in found.pop("pairs")], **found
    )


def blank(case: Case, **found: Any) -> CaseRecord:
    """Return the record of a case with what is known of it before it runs, and ``found``."""
    load = case.workload
    return CaseRecord(
        name=case.name,
        model=load.model,
        batch=load.batch,
        dtype=load.dtype,
        backend=case.backend,
        program=case.program,
        baseline=f"{case.baseline}/{FULL}",
        ours=case.ours,
        **found,
    )


class Bench:
    """Measures pairs of one workload; parity is judged once a program."""

    def __init__(self, request: Request, scratch: Path) -> None:
        self.request = request
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        ground = prepare_ground(request.workload, self.device, request.tiny, scratch)
        self.ground = ground
        self.programs = Programs(ground, Bundles(ground, scratch))
        self.reference = Reference(ground)
        self._judged: dict[tuple[str, str], Parity] = {}

    def measure(self, case: Case) -> CaseRecord:
        """Measure one pair.

        Raises:
            Unavailable: something is missing here.
            Exception: whatever a program may raise.
        """
        baseline = self.programs.get(case.baseline, FULL)
        candidate = self.programs.get(case.backend, case.program)
        parities = (self._judge(case.backend, case.program), self._judge(case.baseline, FULL))
        record = self._described(case, candidate, parities)
        # A package's schedule is its own affair; its distance to the same schedule as a SubNet is for information.
        foreign = case.backend == EAGER and case.program != FULL
        for name, parity, counts in ((case.program, parities[0], not foreign), (FULL, parities[1], True)):
            if counts and not parity.passed:
                return record.model_copy(update={"status": "failed", "error": f"parity of {name}: {parity.line()}"})
        events = (candidate.on_events, baseline.on_events)
        own, other = time_pair(candidate.run, baseline.run, events, self.request.repeats, self.request.seconds)
        speedup = spread(paired(other.wall, own.wall))
        return record.model_copy(
            update={
                "status": "measured",
                "rounds": len(own.wall),
                "candidate_figures": _figures(candidate, own),
                "baseline_figures": _figures(baseline, other),
                "speedup": speedup,
                "device_speedup": spread(paired(other.device, own.device)) if all(events) else None,
                "efficiency": speedup.median * record.macs_ratio if record.macs_ratio else None,
                "state": state(self.device.type == "cuda"),
            }
        )

    def _judge(self, backend: str, program: str) -> Parity:
        key = (backend, program)
        if key not in self._judged:
            built = self.programs.get(backend, program)
            assert built.plan is not None
            self._judged[key] = self.reference.judge(built.plan, built.latent())
        return self._judged[key]

    def _described(self, case: Case, candidate: Built, parities: tuple[Parity, Parity]) -> CaseRecord:
        plan, full = candidate.plan, self.ground.plan(FULL)
        assert plan is not None
        return blank(
            case,
            status="failed",
            scope=candidate.scope,
            calls=plan.sampler.calls,
            launches=candidate.launches,
            signatures=candidate.signatures,
            macs=plan.subnet.cost.subnet * plan.trace.rows,
            macs_ratio=plan.subnet.cost.subnet / full.subnet.cost.subnet,
            parity=parities[0],
            baseline_parity=parities[1],
        )


def _figures(built: Built, samples: Samples) -> Figures:
    return Figures(
        wall=spread(samples.wall),
        device=spread(samples.device) if samples.device else None,
        peak_bytes=built.peak_bytes,
        build_seconds=built.seconds,
    )


def work(request: Request, send: Callable[[dict[str, Any]], None]) -> None:
    """Measure all cases in order and send a record each; one that fails leaves the rest to go on.

    An error of the device is the end of the process: nothing runs on after it. The parent starts another.
    """
    torch._dynamo.config.recompile_limit = 64
    with tempfile.TemporaryDirectory(prefix="dipgo-gpu-") as scratch:
        started = time.perf_counter()
        bench = Bench(request, Path(scratch))
        _log(f"{request.workload.name}: drawn in {time.perf_counter() - started:.1f} s")
        for case in request.cases():
            send({"begin": case.name})
            started = time.perf_counter()
            poisoned = False
            try:
                record = bench.measure(case)
            except Unavailable as error:
                record = blank(case, status="skipped", error=str(error))
            except Exception as error:  # a program may fail in any way; the others go on
                _log(traceback.format_exc())
                record = blank(case, status="failed", error=one_line(error))
                poisoned = _poisons(error)
            if record.status == "failed":
                bench.programs.drop()
                gc.collect()
            _log(f"{case.name}: {record.status} in {time.perf_counter() - started:.1f} s {record.error or ''}")
            send({"case": record.model_dump(mode="json")})
            if poisoned:
                os._exit(3)


def _poisons(error: Exception) -> bool:
    """Whether the CUDA context is of no more use; running out of memory leaves it whole."""
    return "CUDA error" in str(error) and not isinstance(error, torch.OutOfMemoryError)


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _end_with_parent() -> None:
    def watch() -> None:
        while os.read(0, 1024):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    request = request_from(sys.argv[1])
    _end_with_parent()
    lines: TextIO = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to the log, not between the lines

    def send(message: dict[str, Any]) -> None:
        lines.write(json.dumps(message) + "\n")
        lines.flush()

    work(request, send)


if __name__ == "__main__":
    main()
