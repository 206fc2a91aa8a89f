"""Gates that are worth learning backups for: the best fixed policies, and such as no rule gives."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dipgo.graph.liveness import canonical
from dipgo.schedule.cost import trajectory_macs
from dipgo.schedule.policies import extrapolation, policies, thinned
from dipgo.searching.context import Work
from dipgo.searching.judge import Candidate
from dipgo.searching.measured import best_slope, measured_schedules


def contenders(work: Work, budget: float, last: np.ndarray | None) -> tuple[list[Candidate], list[Candidate]]:
    """Judge everything that needs no learned backups.

    Args:
        last: the gates that were found for the budget before this one.

    A SubNet that the search was given is judged as it is where it fits the budget, and its backups learn on; where its
    gates cost too much they are thinned out.

    Returns:
        All candidates, and those that learning may begin with, with different gates, the best first.
    """
    fixed = _policies(work, budget)
    schedules = _schedules(work, budget, fixed)
    given = _given(work, budget)
    named = _proposed(work, budget, fixed, last)
    named |= dict(list(schedules.items())[: work.settings.contenders])
    different = {gates.tobytes(): (name, gates) for name, gates in reversed(named.items())}
    learned = [candidate for candidate in given if candidate.weights]
    for candidate in learned:
        different.pop(candidate.gates.tobytes(), None)
    sloped = [_sloped(work, budget, name, gates, fixed) for name, gates in different.values()]
    return [*fixed, *given, *sloped], sorted([*learned, *sloped], key=lambda candidate: -candidate.psnr)


def _given(work: Work, budget: float) -> list[Candidate]:
    """Judge the SubNets that the search was given, as they are."""
    return [
        work.judge(f"given {number}", start.gates, start.weights)
        for number, start in enumerate(work.starts, 1)
        if _fits(work, budget, start.gates, bool(start.weights))
    ]


def _policies(work: Work, budget: float) -> list[Candidate]:
    """Judge the fixed policies."""
    run = work.run
    fixed = policies(work.task.trace, work.task.sampler.calls, budget, work.drift)

    def judged() -> dict[str, np.ndarray]:
        scores = []
        for number, policy in enumerate(fixed):
            scores.append(work.judge.psnr(policy.gates, policy.weights))
            run.report(f"policies {budget:g}", number + 1, len(fixed), f"{policy.name} {scores[-1]:.2f} dB")
        return {"psnr": np.array(scores)}

    scores = run.once(f"policies-{budget:g}", judged)["psnr"]
    return [Candidate(p.name, p.gates, p.weights, float(db), fixed=True) for p, db in zip(fixed, scores, strict=True)]


def _schedules(work: Work, budget: float, fixed: Sequence[Candidate]) -> dict[str, np.ndarray]:
    """Return the gates of the policies with two cached outputs to combine, the best first: bool ``[calls, sites]``."""
    best = sorted(fixed, key=lambda candidate: -candidate.psnr)
    found = {policy.name: canonical(policy.gates, 2, work.task.trace.live_sites) for policy in best}
    return {name: gates for name, gates in found.items() if _fits(work, budget, gates)}


def _fits(work: Work, budget: float, gates: np.ndarray, learned: bool = True) -> bool:
    trace = work.task.trace
    return trajectory_macs(trace, gates, learned) <= budget * trace.full_macs * len(gates)


def _proposed(work: Work, budget: float, fixed: Sequence[Candidate], last: np.ndarray | None) -> dict[str, np.ndarray]:
    """Propose gates that no rule gives: given ones, the last budget's, and by measured drops."""
    trace, settings = work.task.trace, work.settings
    proposals = {}
    for number, given in enumerate(work.starts, 1):
        gates = canonical(given.gates, 2, trace.live_sites)
        if _fits(work, budget, gates):
            proposals[f"given {number}'s gates"] = gates
        else:
            proposals[f"given {number}, thinned"] = thinned(trace, gates, work.drift, budget)
    if last is not None:
        proposals["thinned"] = thinned(trace, last, work.drift, budget)
    if settings.drops:
        found = measured_schedules(work, budget, fixed)
        proposals |= {name: gates for name, gates in found if _fits(work, budget, gates)}
    return proposals


def _sloped(work: Work, budget: float, name: str, gates: np.ndarray, fixed: Sequence[Candidate]) -> Candidate:
    """Judge the gates with backups that follow as much of the straight line as serves them best.

    Few noises choose how much. Where a fixed policy of these gates does better on held-out noise, its slope counts.
    """
    trace = work.task.trace
    phase = f"slope-{budget:g}-" + "".join(letter if letter.isalnum() else "-" for letter in name)
    slope = work.run.once(phase, lambda: {"slope": np.array(best_slope(work, gates))})["slope"].item()

    def begun(slope: float) -> tuple[str, np.ndarray, dict[str, np.ndarray]]:
        return f"{name}, slope {slope:g}", gates, extrapolation(trace, gates, slope)

    same = [policy for policy in fixed if np.array_equal(canonical(policy.gates, 2, trace.live_sites), gates)]
    as_they_are = [Candidate(*begun(1.0 if policy.weights else 0.0), policy.psnr) for policy in same]
    return max([work.judge(*begun(slope)), *as_they_are], key=lambda candidate: candidate.psnr)
