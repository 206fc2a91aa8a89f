"""Gates that are worth learning backups for: the best fixed policies, and such as no rule gives."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dipgo.search.drops import drop_cheapest
from dipgo.search.gates import budgeted_scores
from dipgo.search.judge import Candidate
from dipgo.search.policies import SPACINGS, Spacing, extrapolation, policies, thinned, whole_steps
from dipgo.search.postprocess import POSTPROCESSES
from dipgo.search.work import Work


def contenders(work: Work, budget: float, last: np.ndarray | None) -> tuple[list[Candidate], list[Candidate]]:
    """Judge everything that needs no learned backups.

    Args:
        last: the gates that were found for the budget before this one.

    Returns:
        All candidates, and those that extrapolate, with different gates, the best first.
    """
    fixed = _policies(work, budget)
    straight = sorted((c for c in fixed if c.weights), key=lambda candidate: -candidate.psnr)
    proposed = _proposed(work, budget, straight[0], last)
    return [*fixed, *proposed], _distinct(sorted([*proposed, *straight], key=lambda candidate: -candidate.psnr))


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


def _proposed(work: Work, budget: float, start: Candidate, last: np.ndarray | None) -> list[Candidate]:
    """Propose gates that no rule gives: the last budget's thinned out, by measured drops, and moved by gradient."""
    trace, settings, run = work.task.trace, work.settings, work.run
    proposals = {}
    if last is not None:
        proposals["thinned"] = thinned(trace, last, work.drift, budget)
    if settings.drops:
        for name, spacing in SPACINGS.items():
            proposals[f"{name}, dropped"] = _dropped(work, budget, name, spacing)
    if settings.gate_iterations:
        scores = budgeted_scores(
            work.pruner(start.gates),
            trace,
            work.task.trajectory,
            work.pool,
            settings.gate_descent,
            work.loss,
            run.phase(f"gates-{budget:g}"),
            budget,
        )
        proposals["moved by gradient"] = POSTPROCESSES[settings.postprocess](trace, scores, budget, True)
    return [work.judge(name, gates, extrapolation(trace, gates)) for name, gates in proposals.items()]


def _dropped(work: Work, budget: float, name: str, spacing: Spacing) -> np.ndarray:
    """Return gates of one whole step too many, less what is missed least."""
    trace, settings, run = work.task.trace, work.settings, work.run
    serving = "mixed" if trace.output_sites() else "inside"
    _, above = whole_steps(trace, work.task.sampler.calls, budget, spacing, serving, learned=True)

    def dropped() -> dict[str, np.ndarray]:
        gates = drop_cheapest(
            trace,
            above,
            budget,
            lambda gates: work.ground.psnr(gates, extrapolation(trace, gates)),
            settings.drops,
            work.seed,
            lambda measured, left: run.report(
                f"drops {budget:g}, {name}", measured, max(measured, settings.drops), f"{left:.2f} dB"
            ),
        )
        return {"gates": gates.astype(np.uint8)}

    return run.once(f"drops-{budget:g}-{name}", dropped)["gates"].astype(bool)


def _distinct(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates without those whose gates an earlier one has."""
    first: dict[bytes, Candidate] = {}
    for candidate in candidates:
        first.setdefault(candidate.gates.tobytes(), candidate)
    return list(first.values())
