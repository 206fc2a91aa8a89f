"""What every phase of a search needs, gathered once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dipgo.eager.drift import measure_drift
from dipgo.graph.costs import Costs
from dipgo.graph.trace import Trace
from dipgo.schedule.subnet import SubNet
from dipgo.searching.config import SearchConfig
from dipgo.searching.judge import Judge
from dipgo.searching.losses import Loss
from dipgo.searching.pool import Pool
from dipgo.searching.run_folder import Phase, Run
from dipgo.searching.task import Task
from dipgo.searching.training_loop import Descent, Training


@dataclass(frozen=True)
class SearchContext:
    """What every phase of a search needs.

    Attributes:
        costs: what budgets are a share of.
        pool: what is learned from.
        judge: compares candidates, on noise of its own.
        ground: the noise for drops and slopes, apart from the judge's.
        starts: SubNets to begin with.
    """

    task: Task
    costs: Costs
    settings: SearchConfig
    run: Run
    pool: Pool
    judge: Judge
    ground: Judge
    loss: Loss
    starts: Sequence[SubNet] = ()

    @property
    def trace(self) -> Trace:
        return self.task.trace

    @cached_property
    def drift(self) -> np.ndarray:
        """How far every site moves from step to step; measured once, when first needed."""
        return self.run.once("drift", lambda: {"drift": drift_of(self.task, self.settings.seed)})["drift"]

    def training(self, descent: Descent, phase: Phase) -> Training:
        """Return what a phase learns with."""
        return Training(self.task.trajectory, self.pool, self.loss, descent, phase)


def drift_of(task: Task, seed: int) -> np.ndarray:
    """Return the drift of every site, ``[calls, sites]``, as a search with this seed measures it."""
    return measure_drift(task.trajectory, task.draw(8, 3_000_000 + seed))
