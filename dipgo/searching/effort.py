"""How much a search computes, from its settings alone, so that a few timed iterations tell how long it will take."""

from __future__ import annotations

from dataclasses import dataclass

from dipgo.schedule.fixed_schedules import SLOPES, SPACINGS
from dipgo.searching.config import SearchConfig


@dataclass(frozen=True)
class Effort:
    """What a search computes at one budget.

    Attributes:
        iterations: gradient steps on learned backups, of ``batch`` images each.
        full: images of full trajectories without gradient: the pool's and the judges'.
        gated: images of gated trajectories without gradient: all that is judged.
    """

    iterations: int
    full: int
    gated: int

    def seconds(self, iteration: float, full: float, gated: float) -> float:
        """Return how long it takes, from the seconds of one iteration and of one image of either trajectory."""
        return self.iterations * iteration + self.full * full + self.gated * gated


def effort_of(config: SearchConfig, budget: float, fixed: int) -> Effort:
    """Return the effort of ``method="dipgo"`` at one budget, from nothing.

    Args:
        fixed: how many fixed schedules there are at the budget.

    Drops are taken to be as many as are measured at first, and candidates as many as there may be, so it is about
    right, not exact; iterations are exact where there are ``contenders`` candidates.
    """
    per_trial, longest = (round(count / budget) for count in (config.trial_iterations, config.backup_iterations))
    trials, judged = _halving(config.contenders, per_trial, longest)
    iterations = sum(trials)
    proposals = config.contenders + (len(SPACINGS) if config.drops else 0)
    on_ground = (len(SPACINGS) * config.drops if config.drops else 0) + len(SLOPES) * proposals
    pool = min(config.pool, iterations * config.batch) if config.pool else iterations * config.batch
    return Effort(
        iterations=iterations,
        full=pool + config.held_out + config.drops_on,
        gated=(fixed + proposals + judged) * config.held_out + on_ground * config.drops_on,
    )


def _halving(contenders: int, per_trial: int, longest: int) -> tuple[list[int], int]:
    """Return the iterations of each trial of successive halving, the last one's too, and how often is judged."""
    if not longest:
        return [], 0
    trials, left, done = [per_trial] * contenders, contenders, per_trial
    while left > 3:
        per_trial, left = 2 * per_trial, left // 2
        trials += [per_trial] * left
        done += per_trial
    return [*trials, max(0, longest - done)], len(trials) + 1
