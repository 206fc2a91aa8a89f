"""Baselines at equal compute: what else the same MACs buy. Each is a SubNet, compiled by the same compiler.

To add one, write a function from the bundle's task and its share of MACs to a task and a SubNet, and list it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.failures import one_line
from dipgo.base.errors import DipgoError
from dipgo.base.progress import Report, silent
from dipgo.graph.trace import trace
from dipgo.model.sampler import make_scheduler
from dipgo.schedule.fixed_schedules import EXTRAPOLATION, Rule, fixed_schedules, spaced
from dipgo.schedule.schedule import Schedule
from dipgo.schedule.subnet import SubNet, load_subnet
from dipgo.searching.context import drift_of
from dipgo.searching.task import Task
from export.bundle import open_bundle
from export.compiler import check_model, prepare, sites_of, write_bundle

Baseline = Callable[[Task, float], tuple[Task, SubNet]]
FULL = "full"
PUBLISHED = Path(__file__).parents[2] / "dipgo" / "published" / "sd15-published-0.8.json"


@dataclass(frozen=True)
class Compiled:
    """A baseline's bundle, or the one-line error that took its place."""

    name: str
    folder: Path | None = None
    error: str | None = None
    seconds: float | None = None  # that compiling it took, without the conversion that all share


def full(task: Task, ratio: float) -> tuple[Task, SubNet]:
    """Every gate 1: the full model, the reference of speed and quality."""
    gates = np.ones((task.sampler.calls, len(task.trace.sites)), bool)
    return task, task.subnet(Schedule(gates), method="full")


def fewer_steps(task: Task, ratio: float) -> tuple[Task, SubNet]:
    """The full model with the same solver in ``ratio`` of the steps."""
    return full(task.with_sampler(task.pipe.scheduler, steps_at(task, ratio)), ratio)


def dpm_fewer_steps(task: Task, ratio: float) -> tuple[Task, SubNet]:
    """The full model with DPM-Solver++ 2M (Lu et al. 2022) in ``ratio`` of the steps."""
    scheduler = make_scheduler("dpm++2m", task.pipe.scheduler)
    return full(task.with_sampler(scheduler, steps_at(task, ratio)), ratio)


def uniform_reuse(task: Task, ratio: float) -> tuple[Task, SubNet]:
    """Whole steps at even intervals; the steps between serve the last outputs."""
    return task, task.subnet(spaced(task.trace.macs, task.sampler.calls, ratio, Rule()), method="uniform reuse")


def uniform_extrapolation(task: Task, ratio: float) -> tuple[Task, SubNet]:
    """Whole steps at even intervals; the steps between extrapolate the last two outputs linearly."""
    schedule = spaced(task.trace.macs, task.sampler.calls, ratio, Rule(history=EXTRAPOLATION))
    return task, task.subnet(schedule, method="uniform extrapolation")


def published(task: Task, ratio: float) -> tuple[Task, SubNet]:
    """The SubNet that DiP-GO's authors published for SD-1.5 at 50 DDIM steps, at 0.2 of the MACs whatever the ratio."""
    own, subnet = from_file(task, ratio, path=PUBLISHED, same_weights=False)
    return own, replace(subnet, model=task.model.identity())


def from_file(task: Task, ratio: float, path: Path, same_weights: bool = True) -> tuple[Task, SubNet]:
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


def best_fixed(task: Task, ratio: float, searched: SubNet, prefix: str = "") -> tuple[Task, SubNet]:
    """Of all fixed schedules at this share (whose names begin so), the one that did best when the SubNet was searched.

    Raises:
        DipgoError: the search noted no scores, or none of such a schedule.
    """
    scores = searched.search.held_out_psnr_db
    fixed = fixed_schedules(task.trace.macs, task.sampler.calls, ratio, drift_of(task, searched.search.seed))
    names = [name for name in fixed if name in scores and name.startswith(prefix)]
    if not names:
        raise DipgoError("the bundle's SubNet notes no scores of such schedules; it was not found by 'dipgo search'")
    best = max(names, key=lambda name: scores[name])
    return task, task.subnet(fixed[best], method=best)


BASELINES: Mapping[str, Baseline] = {
    FULL: full,
    "fewer steps": fewer_steps,
    "fewer steps, DPM-Solver++ 2M": dpm_fewer_steps,
    "uniform reuse": uniform_reuse,
    "uniform extrapolation": uniform_extrapolation,
}
PUBLISHED_NAME, BEST_NAME, DEEP_NAME = "published DiP-GO SubNet", "best fixed policy", "best DeepCache-like policy"
FURTHER = (PUBLISHED_NAME, BEST_NAME, DEEP_NAME)
"""Baselines that suites may name beside :data:`BASELINES`."""


def baselines_for(names: list[str], subnets: Mapping[str, str], searched: SubNet) -> dict[str, Baseline]:
    """Return the baselines of these names that are compiled, the full program first, and those that files hold.

    ``searched`` is the bundle's SubNet; ``{budget}`` in a file's name stands for its budget.
    """
    known: dict[str, Baseline] = {
        **BASELINES,
        PUBLISHED_NAME: published,
        BEST_NAME: partial(best_fixed, searched=searched),
        DEEP_NAME: partial(best_fixed, searched=searched, prefix="DeepCache"),
    }
    chosen = {name: known[name] for name in [FULL, *names] if name in known}
    budget = "unknown" if searched.search.budget is None else f"{searched.search.budget:g}"
    for name, file in subnets.items():
        chosen[name] = partial(from_file, path=Path(file.replace("{budget}", budget)))
    return chosen


def steps_at(task: Task, ratio: float) -> int:
    """Return how many full steps cost ``ratio`` of the task's, at least 2."""
    return max(2, round(task.sampler.steps * ratio))


def compile_baselines(
    task: Task,
    ratio: float,
    folder: Path,
    baselines: Mapping[str, Baseline] = BASELINES,
    progress: Report = silent,
    batch: int = 1,
    whole: bool = True,
) -> list[Compiled]:
    """Compile baselines into ``folder``, one bundle each; the model is converted once.

    Args:
        task: the bundle's; its pipeline's scheduler is the bundle's solver.
        ratio: the bundle's MACs over the full trajectory's.
        batch: the bundle's images a call.
        whole: with what comes before and after the denoiser, as far as there is an exporter for it.

    One that raises has its error in place of a folder.
    """
    total = len(baselines) + 1
    progress("compile baselines", 0, total, "convert")
    prepared = prepare(task.trace, batch, whole)
    compiled = []
    weights: dict[str, Path] = {}
    for number, (name, build) in enumerate(baselines.items()):
        progress("compile baselines", number + 1, total, name)
        target = folder / str(number)
        begin = time.perf_counter()
        try:
            own, subnet = build(task, ratio)
            base = prepared if own.trace is task.trace else prepare(own.trace, batch, whole)
            write_bundle(base, subnet, own.sampler, target)
            _share_weights(target, weights)
            compiled.append(Compiled(name, target, seconds=time.perf_counter() - begin))
        except Exception as error:  # a baseline may fail in any way; the others go on
            compiled.append(Compiled(name, error=one_line(error)))
    progress("compile baselines", total, total, "")
    return compiled


def _share_weights(folder: Path, known: dict[str, Path]) -> None:
    """Replace a bundle's weights files by links to equal ones of another bundle: on disk and in memory once."""
    for name, file in open_bundle(folder, check_files=False).record.files.items():
        if "/" in name:
            first = known.setdefault(file.sha256, folder / name)
            if first != folder / name:
                (folder / name).unlink()
                os.link(first, folder / name)
