"""Which gates learn best: learned backups for several contenders by successive halving, then on for the last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dipgo.schedule.cost import cost_of
from dipgo.searching.backup_fit import Backups, learn_backups
from dipgo.searching.context import Work
from dipgo.searching.judge import Candidate
from dipgo.searching.training_loop import backup_descent


@dataclass(frozen=True)
class Trial:
    """Backups under way for the gates of ``start``: for how many iterations, and the judge's verdict."""

    start: Candidate
    backups: Backups
    iterations: int
    candidate: Candidate


def learned(work: Work, budget: float, starts: Sequence[Candidate]) -> list[Candidate]:
    """Return what learned backups make of the contenders, judged, after every round.

    Successive halving (Jamieson & Talwalkar 2016): while more than three are left, a round keeps the better half and is
    twice as long as the one before, since gates that are behind at first may be ahead afterwards.
    """
    settings = work.settings
    iterations, longest = (round(count / budget) for count in (settings.trial_iterations, settings.backup_iterations))
    if not longest:
        return []
    trials = [
        _on(work, budget, _begin(work, start), iterations, f"trial-{budget:g}-{number}")
        for number, start in enumerate(starts)
    ]
    judged = list(trials)
    while len(trials) > 3:
        iterations *= 2
        trials = [
            _on(work, budget, trial, iterations, f"trial-{budget:g}-{number}-on-{trial.iterations}")
            for number, trial in enumerate(_ranked(trials)[: len(trials) // 2])
        ]
        judged += trials
    best = _ranked(trials)[0]
    last = _on(work, budget, best, max(0, longest - best.iterations), f"backups-{budget:g}")
    return [trial.candidate for trial in (*(judged if iterations else []), last)]


def _begin(work: Work, start: Candidate) -> Trial:
    settings = work.settings
    backups = Backups(
        work.task.trace, start.gates, settings.history, settings.by_channel, settings.by_pass, start.weights
    )
    return Trial(start, backups, 0, start)


def _on(work: Work, budget: float, trial: Trial, iterations: int, phase: str) -> Trial:
    """Learn on for so many iterations, and judge."""
    backups, done = trial.backups, trial.iterations + iterations
    learn_backups(
        backups,
        work.task.trajectory,
        work.pool,
        backup_descent(work.settings, iterations, budget),
        work.loss,
        work.run.phase(phase),
        cost_of(work.task.trace, backups.gates, learned=True).ratio,
    )
    name = f"{trial.start.name}, backups learned, {done} iterations"
    return replace(trial, iterations=done, candidate=work.judge(name, backups.gates, backups.arrays()))


def _ranked(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials, the best first."""
    return sorted(trials, key=lambda trial: -trial.candidate.psnr)
