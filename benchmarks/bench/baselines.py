"""Baselines: what else the bundle's MACs buy, or its wall time. Each is a SubNet, compiled by the same compiler.

To add one, write a function from the bundle's task and its share of the full program to a task and a SubNet, and list
it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.bench.solvers import Solver, best_solver, dpm
from benchmarks.bench.suite import Suite
from benchmarks.failures import one_line
from dipgo.base.errors import DipgoError
from dipgo.graph.trace import Trace, trace
from dipgo.schedule.fixed_schedules import EXTRAPOLATION, Rule, fixed_schedules, spaced
from dipgo.schedule.schedule import Schedule
from dipgo.schedule.subnet import SubNet, load_subnet
from dipgo.searching.context import drift_of
from dipgo.searching.task import Task
from export.bundle import open_bundle
from export.compiler import prepare, write_bundle
from export.sources import check_model, sites_of

FULL = "full"
PUBLISHED = Path(__file__).parents[2] / "dipgo" / "published" / "sd15-published-0.8.json"


@dataclass(frozen=True)
class Share:
    """What the bundle takes of the full program: of its MACs, and of its wall time."""

    macs: float
    time: float


Baseline = Callable[[Task, Share], tuple[Task, SubNet]]


@dataclass(frozen=True)
class Compiled:
    """A baseline's bundle, or the one-line error that took its place."""

    name: str
    folder: Path | None = None
    error: str | None = None
    seconds: float | None = None  # that compiling it took, without the conversion that all share


def full(task: Task, share: Share) -> tuple[Task, SubNet]:
    """Every gate 1: the full model, the reference of speed and quality."""
    gates = np.ones((task.sampler.calls, len(task.trace.sites)), bool)
    return task, task.subnet(Schedule(gates), method="full")


def plain_steps(task: Task, share: Share, steps: int, solver: Solver | None = None) -> tuple[Task, SubNet]:
    """The full model in so many steps of another solver, or of the task's own."""
    scheduler = solver(task.pipe.scheduler) if solver else task.pipe.scheduler
    return full(task.with_sampler(scheduler, steps), share)


def fewer_steps(task: Task, share: Share) -> tuple[Task, SubNet]:
    """The full model with the same solver, in as many steps as the bundle's MACs pay for."""
    return plain_steps(task, share, steps_at(task, share.macs))


def as_long(task: Task, share: Share) -> tuple[Task, SubNet]:
    """The full model with the same solver, in as many steps as take the bundle's wall time."""
    return plain_steps(task, share, steps_at(task, share.time))


def dpm_fewer_steps(task: Task, share: Share) -> tuple[Task, SubNet]:
    """The full model with DPM-Solver++ 2M (Lu et al. 2022), in as many steps as the bundle's MACs pay for."""
    return plain_steps(task, share, steps_at(task, share.macs), dpm)


def uniform_reuse(task: Task, share: Share) -> tuple[Task, SubNet]:
    """Whole steps at even intervals; the steps between serve the last outputs."""
    schedule = spaced(task.trace.macs, task.sampler.calls, share.macs, Rule())
    return task, task.subnet(schedule, method="uniform reuse")


def uniform_extrapolation(task: Task, share: Share) -> tuple[Task, SubNet]:
    """Whole steps at even intervals; the steps between extrapolate the last two outputs linearly."""
    schedule = spaced(task.trace.macs, task.sampler.calls, share.macs, Rule(history=EXTRAPOLATION))
    return task, task.subnet(schedule, method="uniform extrapolation")


def published(task: Task, share: Share) -> tuple[Task, SubNet]:
    """The SubNet that DiP-GO's authors published for SD-1.5 at 50 DDIM steps, at 0.2 of the MACs whatever the share."""
    own, subnet = from_file(task, share, path=PUBLISHED, same_weights=False)
    return own, replace(subnet, model=task.model.identity())


def from_file(task: Task, share: Share, path: Path, same_weights: bool = True) -> tuple[Task, SubNet]:
    """A SubNet from a file, under the bundle's guidance; its sites may be others than the bundle's.

    Raises:
        DipgoError: it belongs to another model or to other timesteps.
    """
    subnet = load_subnet(path)
    if same_weights:
        check_model(subnet, task.model)
    elif subnet.model.config_sha256 != task.model.identity().config_sha256:
        raise DipgoError(f"{path.name} is for {subnet.model.name}, not for {task.model.name}")
    if list(subnet.sampler.timesteps) != [float(t) for t in task.sampler.timesteps]:
        raise DipgoError(f"{path.name} is for other timesteps: {subnet.sampler.steps} of {subnet.sampler.class_name}")
    if [site.name for site in subnet.sites] != [site.name for site in task.trace.sites]:
        own = trace(task.model, sites_of(subnet), task.guidance_scale, task.trace.dtype)
        task = replace(task, trace=own)
    return task, replace(subnet, sampler=task.identity, sites=task.trace.sites)


def best_fixed(task: Task, share: Share, searched: SubNet, prefix: str = "") -> tuple[Task, SubNet]:
    """Of all fixed schedules at this share (whose names begin so), the one that did best when the SubNet was searched.

    Raises:
        DipgoError: the search noted no scores, or none of such a schedule.
    """
    scores = searched.search.held_out_psnr_db
    fixed = fixed_schedules(task.trace.macs, task.sampler.calls, share.macs, drift_of(task, searched.search.seed))
    names = [name for name in fixed if name in scores and name.startswith(prefix)]
    if not names:
        raise DipgoError("the bundle's SubNet notes no scores of such schedules; it was not found by 'dipgo search'")
    best = max(names, key=lambda name: scores[name])
    return task, task.subnet(fixed[best], method=best)


EQUAL_TIME = "fewer steps, equal time"
BASELINES: Mapping[str, Baseline] = {
    FULL: full,
    "fewer steps": fewer_steps,
    EQUAL_TIME: as_long,
    "fewer steps, DPM-Solver++ 2M": dpm_fewer_steps,
    "uniform reuse": uniform_reuse,
    "uniform extrapolation": uniform_extrapolation,
}
PUBLISHED_NAME, BEST_NAME, DEEP_NAME = "published DiP-GO SubNet", "best fixed schedule", "best DeepCache-like schedule"
OTHER, OTHER_EQUAL_TIME = "best other solver", "best other solver, equal time"
FURTHER = (PUBLISHED_NAME, BEST_NAME, DEEP_NAME, OTHER, OTHER_EQUAL_TIME)
"""Baselines that suites may name beside :data:`BASELINES`."""


def baselines_for(suite: Suite, searched: SubNet, task: Task, share: Share) -> dict[str, Baseline]:
    """Return the suite's baselines that are compiled, in its order: those by name, further step counts, those of files.

    Of two that would be the same program the first stays: steps at equal time may be as many as at equal MACs.

    Args:
        searched: the bundle's SubNet; ``{budget}`` in a file's name stands for its budget.
    """
    counts = {"macs": steps_at(task, share.macs), "time": steps_at(task, share.time)}
    others = {OTHER: counts["macs"], OTHER_EQUAL_TIME: counts["time"]}
    known: dict[str, Baseline] = {
        **BASELINES,
        PUBLISHED_NAME: published,
        BEST_NAME: partial(best_fixed, searched=searched),
        DEEP_NAME: partial(best_fixed, searched=searched, prefix="DeepCache"),
    }
    if others.keys() & set(suite.baselines):
        solver = best_solver(task, counts["macs"]) if suite.images else dpm
        known |= {name: partial(plain_steps, steps=steps, solver=solver) for name, steps in others.items()}
    chosen = {name: known[name] for name in suite.baselines if name in known}
    if counts["time"] == counts["macs"]:
        for equal, other in ((EQUAL_TIME, "fewer steps"), (OTHER_EQUAL_TIME, OTHER)):
            if other in chosen:
                chosen.pop(equal, None)
    taken = {counts["macs"], counts["time"], task.sampler.steps}
    for steps in suite.steps:
        if steps not in taken:
            chosen[f"{steps} steps"] = partial(plain_steps, steps=steps)
    budget = "unknown" if searched.search.budget is None else f"{searched.search.budget:g}"
    for name, file in suite.subnets.items():
        chosen[name] = partial(from_file, path=Path(file.replace("{budget}", budget)))
    return chosen


def steps_at(task: Task, ratio: float) -> int:
    """Return how many full steps cost ``ratio`` of the task's, at least 2."""
    return max(2, round(task.sampler.steps * ratio))


class Compiler:
    """Compiles baselines of one task into ``folder``, one bundle each; the model is converted once.

    Args:
        task: the bundle's; its pipeline's scheduler is the bundle's solver.
        batch: the bundle's images a call.
        whole: with what comes before and after the denoiser, as far as there is an exporter for it.
    """

    def __init__(self, task: Task, folder: Path, batch: int = 1, whole: bool = True) -> None:
        self.task, self._folder, self._batch, self._whole = task, folder, batch, whole
        self._prepared = prepare(_with_open_guidance(task.trace), batch, whole)
        self._weights: dict[str, Path] = {}
        self._count = 0

    def compile(self, name: str, build: Baseline, share: Share) -> Compiled:
        """Compile one; one that raises has its error in place of a folder."""
        target, begin = self._folder / str(self._count), time.perf_counter()
        self._count += 1
        try:
            own, subnet = build(self.task, share)
            same = own.trace is self.task.trace
            base = self._prepared if same else prepare(_with_open_guidance(own.trace), self._batch, self._whole)
            write_bundle(base, subnet, own.sampler, target)
            _share_weights(target, self._weights)
        except Exception as error:  # a baseline may fail in any way; the others go on
            return Compiled(name, error=one_line(error))
        return Compiled(name, target, seconds=time.perf_counter() - begin)


def _with_open_guidance(traced: Trace) -> Trace:
    """Return a trace whose guidance scale is a condition, as in the bundle's own: its conversion is kept already."""
    sites = ",".join(site.name for site in traced.sites)
    return trace(traced.model, sites, traced.guidance_scale, traced.dtype, open_guidance=True)


def _share_weights(folder: Path, known: dict[str, Path]) -> None:
    """Replace a bundle's weights files by links to equal ones of another bundle: on disk and in memory once."""
    for name, file in open_bundle(folder, check_files=False).record.files.items():
        if "/" in name:
            first = known.setdefault(file.sha256, folder / name)
            if first != folder / name:
                (folder / name).unlink()
                os.link(first, folder / name)
