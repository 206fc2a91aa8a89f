"""What every phase of a search needs, gathered once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dipgo.eager.drift import measure_drift
from dipgo.schedule.subnet import SubNet
from dipgo.searching.config import SearchConfig
from dipgo.searching.judge import Judge
from dipgo.searching.losses import Loss
from dipgo.searching.pruner import Pruner
from dipgo.searching.run_folder import Run
from dipgo.searching.task import Pool, Task


@dataclass(frozen=True)
class Work:
    """What every phase of a search needs.

    ``ground`` is the noise for drops and slopes, apart from the judge's; ``starts`` are SubNets to begin with.
    """

    task: Task
    settings: SearchConfig
    seed: int
    run: Run
    pool: Pool
    judge: Judge
    ground: Judge
    loss: Loss
    starts: Sequence[SubNet] = ()

    @cached_property
    def drift(self) -> np.ndarray:
        """How far every site moves from step to step; measured once, when first needed."""

        def measured() -> dict[str, np.ndarray]:
            return {"drift": drift_of(self.task, self.seed)}

        return self.run.once("drift", measured)["drift"]

    def pruner(self, start: np.ndarray | None) -> Pruner:
        """Return a new pruner that begins at the gates ``start``, or with everything kept."""
        settings = self.settings
        return Pruner(
            self.task.sampler.calls,
            len(self.task.trace.sites),
            settings.width,
            settings.layers,
            settings.heads,
            settings.hidden,
            settings.attention,
            start,
            confidence=1.0 if start is None else 0.5,
        )


def drift_of(task: Task, seed: int) -> np.ndarray:
    """Return the drift of every site, ``[calls, sites]``, as a search with this seed measures it."""
    return measure_drift(task.trajectory, task.sampling.draw(8, 3_000_000 + seed))
