"""Schedules that are worth learning backups for: the best by rule, SubNets to begin with, and such as no rule gives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from dipgo.graph.liveness import canonical
from dipgo.schedule.fixed_schedules import (
    EXTRAPOLATION,
    REUSE,
    SERVINGS,
    SLOPES,
    SPACINGS,
    Rule,
    extrapolation,
    fixed_schedules,
    thinned,
)
from dipgo.schedule.schedule import Schedule
from dipgo.searching.context import SearchContext
from dipgo.searching.greedy_prune import drop_cheapest


@dataclass(frozen=True)
class Candidate:
    """A schedule, the judge's verdict in dB, and whether it is a fixed one."""

    name: str
    schedule: Schedule
    psnr: float
    fixed: bool = False


def candidates(context: SearchContext, budget: float, last: Schedule | None) -> tuple[list[Candidate], list[Candidate]]:
    """Judge everything that needs no learned backups.

    Args:
        last: what was chosen for the budget before this one.

    A SubNet that the search begins with is judged as it is where it fits the budget, and its backups learn on; where
    its gates cost too much they are thinned out.

    Returns:
        All candidates, and those that learning may begin with, with different gates, the best first.
    """
    fixed = _fixed(context, budget)
    starts = [
        Candidate(f"given {number}", start.schedule, context.judge(start.schedule))
        for number, start in enumerate(context.starts, 1)
        if start.schedule.fits(context.costs, budget)
    ]
    proposals = _without_rule(context, budget, fixed, last) | _best_of_fixed(context, budget, fixed)
    different = {gates.tobytes(): (name, gates) for name, gates in reversed(proposals.items())}
    learned = [candidate for candidate in starts if candidate.schedule.learned]
    for candidate in learned:
        different.pop(candidate.schedule.gates.tobytes(), None)
    sloped = [_sloped(context, budget, name, gates, fixed) for name, gates in different.values()]
    return [*fixed, *starts, *sloped], ranked([*learned, *sloped])


def ranked(judged: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates, the best first."""
    return sorted(judged, key=lambda candidate: -candidate.psnr)


def _fixed(context: SearchContext, budget: float) -> list[Candidate]:
    """Judge the fixed schedules."""
    run = context.run
    fixed = fixed_schedules(context.costs, context.task.sampler.calls, budget, context.drift)

    def judged() -> dict[str, np.ndarray]:
        scores: list[float] = []
        for name, schedule in fixed.items():
            scores.append(context.judge.psnr(schedule))
            run.report(f"fixed schedules {budget:g}", len(scores), len(fixed), f"{name} {scores[-1]:.2f} dB")
        return {"psnr": np.array(scores)}

    scores = run.once(f"fixed-{budget:g}", judged)["psnr"]
    return [Candidate(*item, float(db), fixed=True) for item, db in zip(fixed.items(), scores, strict=True)]


def _best_of_fixed(context: SearchContext, budget: float, fixed: Sequence[Candidate]) -> dict[str, np.ndarray]:
    """Return the gates of the best fixed schedules with two cached outputs to combine: bool ``[calls, sites]``."""
    gates = {candidate.name: _extrapolating(context, candidate.schedule) for candidate in ranked(fixed)}
    fitting = [name for name in gates if context.costs.fits(gates[name], budget, learned=True)]
    return {name: gates[name] for name in fitting[: context.settings.contenders]}


def _extrapolating(context: SearchContext, schedule: Schedule) -> np.ndarray:
    return canonical(schedule.gates, EXTRAPOLATION, context.trace.live_sites)


def _without_rule(
    context: SearchContext, budget: float, fixed: Sequence[Candidate], last: Schedule | None
) -> dict[str, np.ndarray]:
    """Propose gates that no rule gives: those of SubNets to begin with, the last budget's, and by measured drops."""
    costs = context.costs
    proposals = {}
    for number, start in enumerate(context.starts, 1):
        gates = _extrapolating(context, start.schedule)
        if costs.fits(gates, budget, learned=True):
            proposals[f"given {number}'s gates"] = gates
        else:
            proposals[f"given {number}, thinned"] = thinned(costs, gates, context.drift, budget)
    if last is not None:
        proposals["thinned"] = thinned(costs, last.gates, context.drift, budget)
    if context.settings.drops:
        pruned = _pruned(context, budget, fixed)
        proposals |= {name: gates for name, gates in pruned if costs.fits(gates, budget, learned=True)}
    return proposals


def _pruned(context: SearchContext, budget: float, fixed: Sequence[Candidate]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield all spacings with one step more than fits, less what is missed least."""
    scores = {candidate.name: candidate.psnr for candidate in fixed}

    def score(spacing: str, serving: str) -> float:
        rules = [Rule(spacing, serving, history) for history in (REUSE, EXTRAPOLATION)]
        return max(scores.get(rule.name, -np.inf) for rule in rules)

    for spacing in SPACINGS:
        serving = max(SERVINGS, key=partial(score, spacing))
        if score(spacing, serving) > -np.inf:
            rule = Rule(spacing, serving, EXTRAPOLATION)
            yield f"{spacing}, {serving}, dropped", _dropped(context, budget, rule)


def _dropped(context: SearchContext, budget: float, rule: Rule) -> np.ndarray:
    """Return the gates of one computed step more than fits, less what is missed least."""
    trace, settings, calls = context.trace, context.settings, context.task.sampler.calls
    _, steps = rule.whole_steps(context.costs, calls, budget)
    above = rule.gates(trace, calls, steps)

    def report(measured: int, left: float) -> None:
        total = max(measured, settings.drops)
        context.run.report(f"drops {budget:g}, {rule.spacing}", measured, total, f"{left:.2f} dB")

    def dropped() -> dict[str, np.ndarray]:
        slope = _best_slope(context, above)

        def score(gates: np.ndarray) -> float:
            return context.ground.psnr(extrapolation(trace, gates, slope))

        gates = drop_cheapest(context.costs, above, budget, score, settings.drops, settings.seed, report)
        return {"gates": gates.astype(np.uint8)}

    return context.run.once(f"drops-{budget:g}-{rule.spacing}", dropped)["gates"].astype(bool)


def _sloped(
    context: SearchContext, budget: float, name: str, gates: np.ndarray, fixed: Sequence[Candidate]
) -> Candidate:
    """Judge the gates with backups that follow as much of the straight line as serves them best.

    Few noises choose how much. Where a fixed schedule of these gates does better on held-out noise, its slope counts.
    """
    phase = f"slope-{budget:g}-" + "".join(letter if letter.isalnum() else "-" for letter in name)
    slope = context.run.once(phase, lambda: {"slope": np.array(_best_slope(context, gates))})["slope"].item()

    def candidate(slope: float, psnr: float | None = None) -> Candidate:
        schedule = extrapolation(context.trace, gates, slope)
        return Candidate(f"{name}, slope {slope:g}", schedule, context.judge(schedule) if psnr is None else psnr)

    same = [one for one in fixed if np.array_equal(_extrapolating(context, one.schedule), gates)]
    as_they_are = [candidate(1.0 if one.schedule.learned else 0.0, one.psnr) for one in same]
    return max([candidate(slope), *as_they_are], key=lambda one: one.psnr)


def _best_slope(context: SearchContext, gates: np.ndarray) -> float:
    """Return the best of :data:`SLOPES`, as measured."""
    return max(SLOPES, key=lambda slope: context.ground.psnr(extrapolation(context.trace, gates, slope)))
