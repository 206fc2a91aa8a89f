"""Schedules that no rule gives: when to compute, and what to leave out then, as running the trajectory says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np

from dipgo.schedule.policies import SERVINGS, SLOPES, SPACINGS, extrapolation, gates_of_steps, policy_name, whole_steps
from dipgo.searching.context import Work
from dipgo.searching.greedy_prune import drop_cheapest
from dipgo.searching.judge import Candidate, Judge
from dipgo.searching.local_search import Steps, move_steps

GROUP = 4  # images that are measured together when moves are compared


def measured_schedules(work: Work, budget: float, fixed: Sequence[Candidate]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield all spacings with one step more than fits, as they are and moved, less what is missed least."""
    trace, calls = work.task.trace, work.task.sampler.calls
    judged = {policy.name: policy.psnr for policy in fixed}

    def score(spacing: str, serving: str) -> float:
        return max(judged.get(policy_name(spacing, learned, serving), -np.inf) for learned in (False, True))

    served = {spacing: max(SERVINGS, key=lambda serving: score(spacing, serving)) for spacing in SPACINGS}
    fitting = [spacing for spacing in SPACINGS if score(spacing, served[spacing]) > -np.inf]
    for spacing in fitting:
        _, steps = whole_steps(trace, calls, budget, SPACINGS[spacing], served[spacing], learned=True)
        yield f"{spacing}, {served[spacing]}, dropped", _dropped(work, budget, steps, served[spacing], spacing)
    if work.settings.moves and fitting:
        serving = served[max(fitting, key=lambda spacing: score(spacing, served[spacing]))]
        yield f"moved, {serving}, dropped", _dropped(work, budget, _moved(work, budget, serving), serving, "moved")


def _moved(work: Work, budget: float, serving: str) -> Sequence[int]:
    """Return one computed step more than the budget allows, moved to where they do best.

    Moves begin at the best spacing, and are compared at the slope between reuse and extrapolation that is best there.
    """
    trace, calls, moves = work.task.trace, work.task.sampler.calls, work.settings.moves

    def report(measured: int, found: float) -> None:
        work.run.report(f"moves {budget:g}", measured, moves, f"{found:.2f} dB")

    def moved() -> dict[str, np.ndarray]:
        groups = -(-work.settings.moves_on // GROUP)
        first = 5_000_000 + groups * work.seed
        judges = [Judge(work.task, GROUP, first + group, work.run) for group in range(groups)]

        def gates_of(steps: Sequence[int]) -> np.ndarray:
            return gates_of_steps(trace, calls, steps, serving, learned=True)

        @cache
        def score(steps: Steps, slope: float, group: int) -> np.ndarray:
            gates = gates_of(steps)
            return judges[group].psnrs(gates, extrapolation(trace, gates, slope))

        above = (whole_steps(trace, calls, budget, SPACINGS[name], serving, learned=True)[1] for name in SPACINGS)
        begun: list[tuple[Steps, float]] = [(tuple(steps), best_slope(work, gates_of(steps))) for steps in above]
        best, slope = max(begun, key=lambda it: np.mean([score(*it, group) for group in range(groups)]))
        found = move_steps(
            best, calls, lambda steps, group: score(steps, slope, group), groups, moves, work.seed, report
        )
        return {"steps": np.array(found, int)}

    return [int(step) for step in work.run.once(f"moves-{budget:g}", moved)["steps"]]


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
