"""Baselines at equal compute: what else the same MACs buy. Each is a SubNet, compiled by the same compiler.

To add one, write a function from the bundle's task and its share of MACs to a task and a SubNet, and list it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.progress import Progress, silent
from dipgo.errors import DipgoError
from dipgo.sampler import make_scheduler
from dipgo.search.policies import SPACINGS, Policy, extrapolation, spaced
from dipgo.search.search import policy_subnet
from dipgo.search.task import Task
from dipgo.subnet import SubNet
from export.compiler import prepare, write_bundle

Baseline = Callable[[Task, float], tuple[Task, SubNet]]
FULL = "full"


@dataclass(frozen=True)
class Compiled:
    """A baseline's bundle, or the one-line error that took its place."""

    name: str
    folder: Path | None = None
    error: str | None = None


def full(task: Task, ratio: float) -> tuple[Task, SubNet]:
    """Every gate 1: the full model, the reference of speed and quality."""
    gates = np.ones((task.sampler.calls, len(task.trace.sites)), bool)
    return task, policy_subnet(task, Policy("full", gates, {}))


def fewer_steps(task: Task, ratio: float) -> tuple[Task, SubNet]:
    """The full model with the same solver in ``ratio`` of the steps."""
    return full(task.with_sampler(task.pipe.scheduler, steps_at(task, ratio)), ratio)


def dpm_fewer_steps(task: Task, ratio: float) -> tuple[Task, SubNet]:
    """The full model with DPM-Solver++ 2M (Lu et al. 2022) in ``ratio`` of the steps."""
    scheduler = make_scheduler("dpm++2m", task.pipe.scheduler)
    return full(task.with_sampler(scheduler, steps_at(task, ratio)), ratio)


def uniform_reuse(task: Task, ratio: float) -> tuple[Task, SubNet]:
    """Whole steps at even intervals; the steps between serve the last outputs."""
    gates = spaced(task.trace, task.sampler.calls, ratio, SPACINGS["uniform"])
    return task, policy_subnet(task, Policy("uniform reuse", gates, {}))


def uniform_extrapolation(task: Task, ratio: float) -> tuple[Task, SubNet]:
    """Whole steps at even intervals; the steps between extrapolate the last two outputs linearly."""
    gates = spaced(task.trace, task.sampler.calls, ratio, SPACINGS["uniform"], learned=True)
    return task, policy_subnet(task, Policy("uniform extrapolation", gates, extrapolation(task.trace, gates)))


BASELINES: Mapping[str, Baseline] = {
    FULL: full,
    "fewer steps": fewer_steps,
    "fewer steps, DPM-Solver++ 2M": dpm_fewer_steps,
    "uniform reuse": uniform_reuse,
    "uniform extrapolation": uniform_extrapolation,
}


def steps_at(task: Task, ratio: float) -> int:
    """Return how many full steps cost ``ratio`` of the task's, at least 2."""
    return max(2, round(task.sampler.steps * ratio))


def compile_baselines(
    task: Task,
    ratio: float,
    folder: Path,
    baselines: Mapping[str, Baseline] = BASELINES,
    progress: Progress = silent,
    batch: int = 1,
) -> list[Compiled]:
    """Compile baselines into ``folder``, one bundle each; the model is converted once.

    Args:
        task: the bundle's; its pipeline's scheduler is the bundle's solver.
        ratio: the bundle's MACs over the full trajectory's.
        batch: the bundle's images a call.

    Returns:
        One entry a baseline, in order; one that raises has its error in place of a folder.
    """
    total = len(baselines) + 1
    progress("compile baselines", 0, total, "convert")
    prepared = prepare(task.trace, batch)
    compiled = []
    for number, (name, build) in enumerate(baselines.items()):
        progress("compile baselines", number + 1, total, name)
        target = folder / str(number)
        try:
            own, subnet = build(task, ratio)
            write_bundle(prepared, subnet, own.sampler, target)
            compiled.append(Compiled(name, target))
        except Exception as error:  # a baseline may fail in any way; the others go on
            compiled.append(Compiled(name, error=one_line(error)))
    progress("compile baselines", total, total, "")
    return compiled


def one_line(error: Exception) -> str:
    """Return an error as one line; its class too where the project did not raise it."""
    text = " ".join(str(error).split())[:160]
    return text if isinstance(error, DipgoError) else f"{type(error).__name__}: {text}".rstrip(": ")
