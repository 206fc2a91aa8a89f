"""Which gates learn best: learned backups for several candidates by successive halving, then on for the last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dipgo.searching.backup_fit import Backups, learn_backups
from dipgo.searching.candidates import Candidate
from dipgo.searching.context import SearchContext
from dipgo.searching.training_loop import backup_descent


@dataclass(frozen=True)
class Trial:
    """Backups under way for the gates of ``start``: for how many iterations, and the judge's verdict."""

    start: Candidate
    backups: Backups
    iterations: int
    candidate: Candidate


def with_learned_backups(context: SearchContext, budget: float, starts: Sequence[Candidate]) -> list[Candidate]:
    """Return what learned backups make of the candidates, judged, after every round.

    Successive halving (Jamieson & Talwalkar 2016): while more than three are left, a round keeps the better half and is
    twice as long as the one before, since gates that are behind at first may be ahead afterwards.
    """
    settings = context.settings
    iterations, longest = (round(count / budget) for count in (settings.trial_iterations, settings.backup_iterations))
    if not longest:
        return []
    trials = [
        _on(context, budget, _begin(context, start), iterations, f"trial-{budget:g}-{number}")
        for number, start in enumerate(starts)
    ]
    judged = list(trials)
    while len(trials) > 3:
        iterations *= 2
        trials = [
            _on(context, budget, trial, iterations, f"trial-{budget:g}-{number}-on-{trial.iterations}")
            for number, trial in enumerate(_ranked(trials)[: len(trials) // 2])
        ]
        judged += trials
    best = _ranked(trials)[0]
    last = _on(context, budget, best, max(0, longest - best.iterations), f"backups-{budget:g}")
    return [trial.candidate for trial in (*(judged if iterations else []), last)]


def _begin(context: SearchContext, start: Candidate) -> Trial:
    settings = context.settings
    backups = Backups(context.trace, start.schedule, settings.history, settings.by_channel, settings.by_pass)
    return Trial(start, backups, 0, start)


def _on(context: SearchContext, budget: float, trial: Trial, iterations: int, phase: str) -> Trial:
    """Learn on for so many iterations, and judge."""
    training = context.training(backup_descent(context.settings, iterations, budget), context.run.phase(phase))
    learn_backups(trial.backups, training, trial.start.schedule.share(context.costs))
    total, schedule = trial.iterations + iterations, trial.backups.schedule()
    name = f"{trial.start.name}, backups learned, {total} iterations"
    return replace(trial, iterations=total, candidate=Candidate(name, schedule, context.judge(schedule)))


def _ranked(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials, the best first."""
    return sorted(trials, key=lambda trial: -trial.candidate.psnr)
