"""The solver as a recurrence that graphs can carry: the next x from the last few x and ε.

A sampler's table (:mod:`dipgo.model.sampler`) gives x_k from the noise and all ε before it. In a graph that would need
the whole history; but linear multistep samplers remember little, so with a short history p

    x_{i+1} = Σ_{j<p} a[i, j] x_{i-j} + Σ_{j<p} b[i, j] ε_{i-j}

over *launches* i: the silent steps after a launch, which have its ε, are part of its update. The coefficients are
solved from the table, and kept only if the recurrence, run in float32, reproduces it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dipgo.model.sampler import Sampler

LONGEST = 4  # x and ε that a graph may combine; PNDM needs four
_TOLERANCE = 2e-5  # relative; the tables of samplers that compute in float32 inside are themselves good to 1e-6


@dataclass(frozen=True)
class Recurrence:
    """Coefficients by launch: ``latents`` and ``outputs`` are a and b, float64 ``[launches, p]``, newest first.

    Where there is less history than p the coefficients are 0.
    """

    latents: np.ndarray
    outputs: np.ndarray

    @property
    def history(self) -> int:
        return self.latents.shape[1]


def recurrence(sampler: Sampler, launched: Sequence[int]) -> Recurrence | None:
    """Return the shortest recurrence over the calls ``launched``, or None where none up to LONGEST reproduces it.

    None too where the sampler draws noise: graphs are not given it.

    ``launched`` are the calls whose ε is computed, ascending from 0; each other call has the ε of the one before.
    """
    if sampler.draws:
        return None
    rows = by_launch(sampler, launched)
    for history in range(1, LONGEST + 1):
        candidate = _solve(rows, history)
        if _reproduces(candidate, rows):
            return candidate
    return None


def by_launch(sampler: Sampler, launched: Sequence[int]) -> np.ndarray:
    """Return x before each launch, and at the end, over the noise and the ε of launches: ``[L + 1, L + 1]``."""
    count = len(launched)
    owner = np.searchsorted(launched, np.arange(sampler.calls), side="right")  # 1 + the launch that made a call's ε
    gather = np.zeros((sampler.calls + 1, count + 1))
    gather[0, 0] = 1
    gather[np.arange(sampler.calls) + 1, owner] = 1
    return sampler.rows[[*launched, sampler.calls]] @ gather


def _solve(rows: np.ndarray, history: int) -> Recurrence:
    count = len(rows) - 1
    latents, outputs = np.zeros((count, history)), np.zeros((count, history))
    for launch in range(count):
        known = min(history, launch + 1)
        past = rows[launch - known + 1 : launch + 1][::-1]  # newest first
        older = slice(0, launch - known + 2)  # the noise, and every ε that is no longer at hand
        latents[launch, :known] = np.linalg.lstsq(past[:, older].T, rows[launch + 1, older], rcond=None)[0]
        rest = rows[launch + 1] - latents[launch, :known] @ past
        outputs[launch, :known] = rest[launch + 1 - np.arange(known)]
    return Recurrence(latents, outputs)


def _reproduces(candidate: Recurrence, rows: np.ndarray) -> bool:
    vectors = np.random.default_rng(0).normal(size=(rows.shape[1], 256))
    expected = rows @ vectors
    latents = [expected[0].astype(np.float32)]
    epsilons = vectors[1:].astype(np.float32)
    for launch in range(len(rows) - 1):
        total = np.zeros(vectors.shape[1], np.float32)
        for term in range(min(candidate.history, launch + 1)):
            total += np.float32(candidate.latents[launch, term]) * latents[launch - term]
            total += np.float32(candidate.outputs[launch, term]) * epsilons[launch - term]
        latents.append(total)
        error = np.linalg.norm(total - expected[launch + 1])
        if not error <= _TOLERANCE * np.linalg.norm(expected[launch + 1]):
            return False
    return True
