"""Rows of a table in the manner of caches that others publish: whole steps, and rules for what stands between them.

- TaylorSeer (Liu et al. 2025): every n-th step is computed, and all that is cached goes on by a Taylor series whose
  derivatives are differences of what was computed last.
- MeanCache (Gao et al. 2026): the velocity itself is cached, and used as its average over what is skipped. For a solver
  that adds up velocities this is the line through the last two, over the noise level and not over steps.
- DPCache (Cui et al. 2026): of all paths of so many computed steps the one with the least error, by dynamic programming
  over full trajectories, here with that same line.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import numpy as np
import torch

from dipgo.graph.trace import Trace
from dipgo.schedule.fixed_schedules import EXTRAPOLATION, SPACINGS, Rule
from dipgo.schedule.schedule import Schedule, backup_outputs
from dipgo.searching.task import Task

SEED, IMAGES = 6_100_000, 32  # of the trajectories that a path is chosen on


def rivals(task: Task, budget: float) -> dict[str, list[Schedule]]:
    """Return the schedules of each row; of several the best counts. Empty where the solver adds up no velocities."""
    costs, calls = task.trace.macs, task.sampler.calls
    steps = np.arange(calls, dtype=float)

    def gates_of(spacing: str, serving: str) -> np.ndarray:
        rule = Rule(spacing, serving, EXTRAPOLATION)
        return rule.gates(costs.trace, calls, rule.whole_steps(costs, calls, budget)[0])

    servings = ("inside", "whole") if task.trace.output_sites() else ("inside",)
    rows = {
        f"TaylorSeer-like, {name} order": [
            taylor(task.trace, gates_of("uniform", serving), steps, order) for serving in servings
        ]
        for order, name in ((1, "first"), (2, "second"))
    }
    levels = noise_levels(task)
    if levels is None or "whole" not in servings:
        return rows
    rows["MeanCache-like average velocity"] = [
        taylor(task.trace, gates_of(spacing, "whole"), levels[:-1], 1) for spacing in SPACINGS
    ]
    count = int(gates_of("uniform", "whole")[:, task.trace.output_sites()[0]].sum())
    batch = task.draw(IMAGES, SEED)
    with torch.no_grad():
        latents = torch.stack(task.trajectory.full(batch.noise, batch.conditions)).flatten(2).double().numpy()
    path = best_path(latents, levels, count)
    whole = Rule(serving="whole", history=EXTRAPOLATION).gates(task.trace, calls, path)
    rows["DPCache-like, the best path"] = [taylor(task.trace, whole, levels[:-1], 1)]
    return rows


def noise_levels(task: Task) -> np.ndarray | None:
    """Return the levels ``[calls + 1]`` between which each call's velocity is added up; None for other solvers."""
    if task.sampler.draws:
        return None
    moves = np.diff(task.sampler.rows, axis=0)
    own = np.array([moves[step, 1 + step] for step in range(len(moves))])
    moves[np.arange(len(moves)), 1 + np.arange(len(moves))] = 0
    return None if np.abs(moves).max() > 1e-5 else np.concatenate([[0.0], own.cumsum()])


def taylor(trace: Trace, gates: np.ndarray, times: np.ndarray, order: int) -> Schedule:
    """Return the gates with backups that go on by a Taylor series of what was computed last.

    Args:
        times: of each call ``[calls]``, what the series is over.
        order: 1 is a straight line.
    """
    table = [_taylor(column, times, order) for column in gates.T]
    return Schedule(gates, {name: table[site] for name, site, _ in backup_outputs(trace)}).canonical(trace)


def _taylor(column: np.ndarray, times: np.ndarray, order: int) -> np.ndarray:
    """Return the weights ``[calls, order + 1]`` of the last outputs, the newest first."""
    weights = np.zeros((len(column), order + 1), np.float32)
    past: list[int] = []
    for step, gate in enumerate(column):
        if gate:
            past = [step, *past][: order + 1]
            continue
        terms = series([times[each] for each in past], times[step])
        weights[step, : len(terms)] = terms
    return weights


def series(past: Sequence[float], time: float) -> np.ndarray:
    """Return what values at ``past`` times, the newest first, weigh in the series at ``time``: ``[len(past)]``.

    The derivatives are TaylorSeer's: each is the difference of two of the order below, over the time between.
    """
    derivatives, factor, weights = list(np.eye(len(past))), 1.0, np.zeros(len(past))
    for order in range(len(past)):
        weights += factor * derivatives[0]
        factor *= (time - past[0]) / (order + 1)
        spans = [newer - older for newer, older in pairwise(past)]
        derivatives = [(new - old) / span for new, old, span in zip(derivatives, derivatives[1:], spans, strict=False)]
    return weights


def best_path(latents: np.ndarray, levels: np.ndarray, count: int) -> list[int]:
    """Return the ``count`` computed steps, the first among them, whose line between goes least astray.

    Args:
        latents: of full trajectories ``[calls + 1, images, values]``.
        levels: see :func:`noise_levels`.

    The error of a stretch from one computed step to the next is how far it leads from the full trajectory's latent by
    itself, squared. It depends on the computed step before, so paths are told apart by their last two steps.
    """
    calls, spans = len(levels) - 1, np.diff(levels)
    velocities = np.diff(latents, axis=0) / spans[:, None, None]

    @cache
    def error(before: int, own: int, after: int) -> float:
        astray = np.zeros(latents.shape[1:])
        for step in range(own + 1, after):
            weights = series([levels[own], levels[before]][: 1 + (before >= 0)], levels[step])
            line = sum(weight * velocities[each] for weight, each in zip(weights, (own, before), strict=False))
            astray += spans[step] * (line - velocities[step])
        return float(np.square(astray).sum())

    best: dict[tuple[int, int], tuple[float, list[int]]] = {(-1, 0): (0.0, [0])}
    for place in range(1, count + 1):
        reached: dict[tuple[int, int], tuple[float, list[int]]] = {}
        for (before, own), (total, path) in best.items():
            # What is behind must leave room for the steps to come; the last stretch goes to the end.
            afters = [calls] if place == count else range(own + 1, calls - (count - place) + 1)
            for after in afters:
                found = (total + error(before, own, after), [*path, after])
                key = (own, after)
                if key not in reached or found < reached[key]:
                    reached[key] = found
        best = reached
    return min(best.values())[1][:-1]
