"""How long a benchmark will take, and how far it is: told from what was timed before measuring begins."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from benchmarks.bench.subjects import ProgramSpec, ProgramSubject
from benchmarks.bench.suite import Suite
from benchmarks.bench.techniques import TECHNIQUES
from dipgo.base.progress import Report
from dipgo.base.units import duration

LOOPS = 5
SLOW = 5.0  # seconds of a loop that is not run again to see how long it takes
START, TORCH_START = 2.0, 8.0  # seconds until a process has loaded a small program, and a small pipeline in torch
EXPORT, COMPILE = 20.0, 3.0  # seconds to convert a small model, and to compile one more program of it
STEP_RUNS = 5  # of each process at the most, in which steps are timed


@dataclass(frozen=True)
class Plan:
    """Seconds by what they go into: ``parts`` are those of :func:`benchmarks.bench.measuring.measure_all`."""

    compiling: float
    parts: dict[str, float]
    programs: int
    rounds: int

    @classmethod
    def of(
        cls,
        suite: Suite,
        batch: int,
        seconds: Sequence[float],
        torch_seconds: float,
        compiled: int,
        in_torch: int,
        compiling: float,
    ) -> Plan:
        """Foresee a run of ``compiled`` programs and ``in_torch`` techniques.

        Args:
            seconds: of one loop of the full program and of the bundle, which the other programs resemble.
            torch_seconds: of the full model's loop in torch.
            compiling: seconds that compiling and verifying what is left will take.
        """
        full, own = seconds
        once = full + (compiled - 1) * own + in_torch * torch_seconds
        per_round = once * (2 if suite.warm_up else 1)
        repeats = math.ceil(suite.repeats / suite.processes)
        shares = {scope: max(repeats * per_round, suite.seconds / suite.processes) for scope in ("loop", *suite.scopes)}
        if "step" in shares:
            shares["step"] = min(repeats, STEP_RUNS) * once
        parts = {}
        for number in range(suite.processes):
            parts[f"load {number}"] = compiled * START + in_torch * TORCH_START + suite.warm_up * once
            parts |= {f"{scope} {number}": share for scope, share in shares.items()}
        parts["images"] = math.ceil(suite.images / batch) * once
        return cls(compiling, parts, compiled + in_torch, suite.repeats)

    def line(self) -> str:
        """Return how long it takes and what for."""
        total = self.compiling + sum(self.parts.values())
        pieces = [f"{duration(self.compiling)} to compile and verify"] if self.compiling else []
        measuring = sum(seconds for name, seconds in self.parts.items() if name != "images")
        pieces.append(f"{duration(measuring)} to time {self.programs} programs in {self.rounds} rounds")
        if self.parts["images"]:
            pieces.append(f"{duration(self.parts['images'])} to make their images")
        return f"takes about {duration(total)}: {', '.join(pieces)}"


def foreseen(suite: Suite, image: float, share: float) -> float:
    """Return about how many seconds a benchmark takes, before there is a program.

    Args:
        image: seconds of one image of the full model in torch, which its program resembles.
        share: of the full program's MACs that the bundle keeps.
    """
    in_torch = sum(name in TECHNIQUES for name in suite.baselines)
    others = len(suite.baselines) - in_torch + len(suite.steps) + len(suite.subnets)
    compiling = others * (COMPILE + 2 * share * image)  # in torch and compiled, for parity
    compiled = 2 * len(suite.backends) + others
    plan = Plan.of(suite, 1, [image, share * image], image, compiled, in_torch, EXPORT + compiling)
    return plan.compiling + sum(plan.parts.values())


class Parts:
    """One bar for all parts of a plan, as long as each was foreseen to take; it counts up once."""

    def __init__(self, progress: Report, phase: str, parts: dict[str, float]) -> None:
        self._progress, self._phase, self._parts = progress, phase, parts

    def report(self, part: str, iteration: int, total: int, figure: str) -> None:
        """Say how far a part is; those before it are done."""
        names = list(self._parts)
        before = sum(self._parts[name] for name in names[: names.index(part)])
        whole = max(1, round(sum(self._parts.values())))
        done = before + self._parts[part] * iteration / max(1, total)
        self._progress(self._phase, min(whole, round(done)), whole, figure)


def loop_seconds(specs: Sequence[ProgramSpec], known: Sequence[float | None]) -> list[float]:
    """Return the seconds of each program's loop: medians of interleaved runs.

    ``known`` are those of a first run; where all of these are slow they are not run again.
    """
    if all(seconds is not None and seconds > SLOW for seconds in known):
        return [float(seconds or 0) for seconds in known]
    samples: list[list[float]] = [[] for _ in specs]
    with ExitStack() as stack:
        subjects = [ProgramSubject(spec) for spec in specs]
        for subject in subjects:
            stack.callback(subject.close)
            subject.loop()
        for _ in range(LOOPS):
            for subject, taken in zip(subjects, samples, strict=True):
                begin = time.perf_counter()
                subject.loop()
                taken.append(time.perf_counter() - begin)
    return [float(np.median(taken)) for taken in samples]
