"""How fast a search goes, from a few iterations: how many per minute, peak memory, and how long all of it takes.

    python -m benchmarks.studies.search_pace sd-1.5 --steps 50 --sites block,layer --precision bf16,fp16 --batch 1,4 \\
        --device auto -o search-pace.json

Random weights, the settings of ``--preset gpu`` but for what is named. A whole search is put together from the seconds
of one iteration and of one image of either trajectory (:mod:`dipgo.searching.effort`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch

from benchmarks.failures import one_line
from benchmarks.studies.study import Study, StudyRecord, Words, run
from dipgo.base.records import Record
from dipgo.model.models import Model, find_model
from dipgo.schedule.fixed_schedules import EXTRAPOLATION, Rule, fixed_schedules, spaced
from dipgo.searching.backup_fit import Backups, learn_backups
from dipgo.searching.config import SearchConfig
from dipgo.searching.effort import effort_of
from dipgo.searching.journal import peak_memory
from dipgo.searching.judge import Judge
from dipgo.searching.losses import make_loss
from dipgo.searching.pool import Pool
from dipgo.searching.run_folder import Run
from dipgo.searching.search import PRECISIONS
from dipgo.searching.task import Task, make_task
from dipgo.searching.training_loop import Training, backup_descent

ITERATIONS = 2  # that are timed, after one that warms up


class Pace(Record):
    """What one setting of a search was measured at; ``seconds`` is of a whole search.

    Attributes:
        full_seconds, gated_seconds: of one image of a trajectory without gradient.
        peak_bytes: of the device's memory, or of the process's on the CPU.
    """

    sites: str
    precision: str
    batch: int
    recompute: bool
    iterations_per_minute: float | None = None
    full_seconds: float | None = None
    gated_seconds: float | None = None
    peak_bytes: int | None = None
    iterations: int | None = None
    seconds: float | None = None
    error: str | None = None

    def line(self) -> str:
        """Return the row as one line of text."""
        what = f"{self.sites}, {self.precision}, batch {self.batch}"
        if self.error or self.seconds is None or self.peak_bytes is None:
            return f"search by {what}: {self.error}"
        return (
            f"search by {what}: {self.iterations_per_minute:.1f} iterations per minute, "
            f"{self.peak_bytes / 1e9:.1f} GB; all {self.iterations} of them, and the rest of a whole search, take "
            f"{self.seconds / 3600:.1f} hours"
        )


class SearchPace(StudyRecord):
    """The result file."""

    model: str
    steps: int
    budget: float
    rows: list[Pace]


def paces(
    model: Model, config: SearchConfig, sites: list[str], precisions: list[str], batches: list[int]
) -> Iterator[Pace]:
    """Yield a row for each setting as soon as it is measured; one that fails has its error.

    ``config`` holds the steps, the one budget and all settings but precision and batch.
    """
    for granularity in sites:
        task = make_task(model, config.steps, config.sampler, granularity, device=config.device)
        schedule = spaced(task.trace.macs, task.sampler.calls, config.budget[0], Rule(history=EXTRAPOLATION))
        for precision, batch in product(precisions, batches):
            own = config.changed(precision=precision, batch=batch)
            pace = Pace(sites=granularity, precision=precision, batch=batch, recompute=own.recompute)
            try:
                yield pace.model_copy(update=_measured(task, own, schedule))
            except Exception as error:  # as a rule memory; other settings may fit
                yield pace.model_copy(update={"error": one_line(error)})
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def _measured(task: Task, config: SearchConfig, schedule: Any) -> dict[str, Any]:
    """Learn backups for a few iterations, and time both trajectories on as many images as a batch has."""
    budget = config.budget[0]
    task = task.with_trajectory(precision=PRECISIONS[config.precision], recompute=config.recompute)
    device, backups = task.trajectory.device, Backups(task.trace, schedule, config.history)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    judge = Judge(task, config.batch, config.seed, Run(), config.batch)
    judge.psnr(backups.schedule())  # the references, and what libraries do at first
    pool = Pool(task, config.batch, config.batch, config.seed, chunk=config.batch)
    full = _seconds(lambda: pool[0], device) / config.batch
    gated = _seconds(lambda: judge.psnr(backups.schedule()), device) / config.batch
    loss, marks = make_loss(config.loss, task.decode), [time.perf_counter()]

    def mark(*_: object) -> None:
        marks.append(time.perf_counter())

    descent = backup_descent(config, 1 + ITERATIONS, budget)
    learn_backups(backups, Training(task.trajectory, pool, loss, descent, Run(report=mark).phase("pace")))
    iteration = (marks[-1] - marks[1]) / ITERATIONS
    fixed = len(fixed_schedules(task.trace.macs, task.sampler.calls, budget)) + 2  # and two by drift
    effort = effort_of(config, budget, fixed)
    return {
        "iterations_per_minute": 60 / iteration,
        "full_seconds": full,
        "gated_seconds": gated,
        "peak_bytes": peak_memory(device),
        "iterations": effort.iterations,
        "seconds": effort.seconds(iteration, full, gated),
    }


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return how long work takes, on the device too."""
    begin = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def main(words: Words | None = None) -> None:
    study = Study("search_pace", __doc__, words)
    study.parser.add_argument("model")
    study.parser.add_argument("--steps", type=int, default=50)
    study.parser.add_argument("--budget", type=float, default=0.2)
    study.parser.add_argument("--sites", default="block", help="granularities, joined by commas")
    study.parser.add_argument("--precision", default="bf16", help="fp32, fp16 or bf16, joined by commas")
    study.parser.add_argument("--batch", default="4", help="images an iteration, joined by commas")
    study.parser.add_argument("--device", default="auto")
    options = study.options()
    config = SearchConfig(steps=options.steps, budget=options.budget, preset="gpu", device=options.device)
    rows = []
    batches = [int(each) for each in options.batch.split(",")]
    model = find_model(options.model, random_weights=True)
    for row in paces(model, config, options.sites.split(","), options.precision.split(","), batches):
        print(row.line(), flush=True)
        rows.append(row)
    study.write(
        SearchPace(model=options.model, steps=options.steps, budget=options.budget, rows=rows, **study.origin())
    )


if __name__ == "__main__":
    run(main)
