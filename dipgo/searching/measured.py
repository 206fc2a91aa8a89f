"""Schedules that no rule gives: what to leave out of computed steps, as running the trajectory says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from dipgo.schedule.policies import SERVINGS, SLOPES, SPACINGS, extrapolation, gates_of_steps, policy_name, whole_steps
from dipgo.searching.context import Work
from dipgo.searching.greedy_prune import drop_cheapest
from dipgo.searching.judge import Candidate


def measured_schedules(work: Work, budget: float, fixed: Sequence[Candidate]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield all spacings with one step more than fits, less what is missed least."""
    trace, calls = work.task.trace, work.task.sampler.calls
    judged = {policy.name: policy.psnr for policy in fixed}

    def score(spacing: str, serving: str) -> float:
        return max(judged.get(policy_name(spacing, learned, serving), -np.inf) for learned in (False, True))

    served = {spacing: max(SERVINGS, key=lambda serving: score(spacing, serving)) for spacing in SPACINGS}
    fitting = [spacing for spacing in SPACINGS if score(spacing, served[spacing]) > -np.inf]
    for spacing in fitting:
        _, steps = whole_steps(trace, calls, budget, SPACINGS[spacing], served[spacing], learned=True)
        yield f"{spacing}, {served[spacing]}, dropped", _dropped(work, budget, steps, served[spacing], spacing)


def _dropped(work: Work, budget: float, steps: Sequence[int], serving: str, name: str) -> np.ndarray:
    """Return gates of computed steps that cost too much, less what is missed least."""
    trace, settings = work.task.trace, work.settings
    above = gates_of_steps(trace, work.task.sampler.calls, steps, serving, learned=True)

    def report(measured: int, left: float) -> None:
        total = max(measured, settings.drops)
        work.run.report(f"drops {budget:g}, {name}", measured, total, f"{left:.2f} dB")

    def dropped() -> dict[str, np.ndarray]:
        slope = best_slope(work, above)

        def score(gates: np.ndarray) -> float:
            return work.ground.psnr(gates, extrapolation(trace, gates, slope))

        return {"gates": drop_cheapest(trace, above, budget, score, settings.drops, work.seed, report).astype(np.uint8)}

    return work.run.once(f"drops-{budget:g}-{name}", dropped)["gates"].astype(bool)


def best_slope(work: Work, gates: np.ndarray) -> float:
    """Return the best of :data:`SLOPES`, as measured."""
    return max(SLOPES, key=lambda slope: work.ground.psnr(gates, extrapolation(work.task.trace, gates, slope)))
