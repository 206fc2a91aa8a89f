"""Starts: how a scheduler goes on where a trajectory begins at a later call, from a picture with noise on it.

Image-to-image pipelines start at call k (``set_begin_index``), where multistep samplers have no past yet, and
inpainting ones change x after every call. So here x is what the scheduler is handed at each call, as a table by start:

    x after call s = Σ_j steps[k, s, 0, j] x_{s-j} + Σ_j steps[k, s, 1, j] ε_{s-j} + draws[k, s] z_s

Read off the real scheduler, as :mod:`dipgo.model.sampler` reads its table.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dipgo.base.errors import UsageError, one_line
from dipgo.model.noise_source import drawing
from dipgo.model.sampler import Sampler
from dipgo.model.scheduler_run import Run

LARGEST = 64 * 2**20  # bytes of a table
_CURE = "export without --image, or search with ddim, dpm++2m, euler or unipc"


@dataclass(frozen=True)
class Starts:
    """A scheduler's steps from every start, for a history of p past x and ε (the newest first).

    Attributes:
        order: calls of the denoiser per step that a request counts; a start is a multiple of it.
        steps: float64 ``[calls, calls, 2, p]``; zero before the start, and where there is no past.
        draws: float64 ``[calls, calls]``, the factor of the noise that a call draws; zero where it draws none.
        noised: float64 ``[calls, 2]``, the factors of a picture's latent and of noise in x before a call.
    """

    order: int
    steps: np.ndarray
    draws: np.ndarray
    noised: np.ndarray


def starts_of(scheduler: Any, sampler: Sampler) -> Starts:
    """Read the steps from every start off a scheduler, whose table is ``sampler``.

    Raises:
        UsageError: a scheduler that adds no noise to pictures, or draws or steps in a way that has no such table.
    """
    run = Run(scheduler, sampler.steps, sampler.settings, None, {**sampler.options, "generator": torch.Generator()})
    order = int(getattr(scheduler, "order", 1))
    try:
        from_each = {begin: _from(run, begin, sampler.calls) for begin in range(0, sampler.calls, order)}
    except UsageError:
        raise
    except Exception as error:  # whatever a scheduler may say of its ways
        raise UsageError(f"sampler {sampler.name} does not start from pictures ({one_line(error)}); {_CURE}") from error
    history = max(one.steps.shape[2] for one in from_each.values())
    if sampler.calls**2 * 2 * history * 8 > LARGEST:
        raise UsageError(f"sampler {sampler.name} has too many steps to start at each of {sampler.calls}; {_CURE}")
    steps = np.zeros((sampler.calls, sampler.calls, 2, history))
    draws = np.zeros((sampler.calls, sampler.calls))
    noised = from_each[0].noised
    for begin, one in from_each.items():
        steps[begin, begin:, :, : one.steps.shape[2]] = one.steps
        draws[begin, begin:] = one.draws
        if not np.allclose(one.noised[0], noised[begin], rtol=1e-4, atol=1e-6):
            raise UsageError(f"sampler {sampler.name} has other noise on its way than where it starts; {_CURE}")
    starts = Starts(order, steps, draws, noised)
    if not np.allclose(_composed(starts, sampler), sampler.rows, rtol=1e-3, atol=1e-3):
        raise UsageError(f"sampler {sampler.name} does not step by what it is handed; {_CURE}")
    return starts


@dataclass(frozen=True)
class _Start:
    """What a scheduler does from one start, over the calls from there on; for shapes see :class:`Starts`."""

    steps: np.ndarray
    draws: np.ndarray
    noised: np.ndarray


def _from(run: Run, begin: int, calls: int) -> _Start:
    """Run a scheduler from a call on, with a basis vector as x and one as ε at each call, and as each draw."""
    scheduler, count, drawn = run.scheduler, calls - begin, itertools.count()
    basis = torch.eye(3 * count, dtype=torch.float64)[:, None, :, None, None]  # some insist on [B, C, H, W]
    run.start()
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)

    def draw(original: Any, shape: Any, generator: Any = None, **_: Any) -> torch.Tensor:
        return basis[2 * count + next(drawn)].view(shape)

    rows, noised = [], [_noised(scheduler, begin)]
    with drawing(type(scheduler), draw):
        for call in range(count):
            timestep = scheduler.timesteps[begin + call]
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(basis[call], timestep)
            after = scheduler.step(basis[count + call], timestep, basis[call], **run.options).prev_sample
            rows.append(after.to(torch.float64).flatten().numpy())
            if call + 1 < count:
                noised.append(_noised(scheduler, begin + call + 1))
    latents, outputs, draws = np.split(np.stack(rows), 3, axis=1)
    number = np.cumsum(draws.any(axis=1)) - 1
    mine = np.where(draws.any(axis=1), draws[range(count), number.clip(min=0)], 0.0)
    if np.count_nonzero(draws) != np.count_nonzero(mine):
        raise UsageError(f"sampler {type(scheduler).__name__} draws noise more than once a step; {_CURE}")
    both = np.stack([_newest_first(latents), _newest_first(outputs)], axis=1)
    history = 1 + int(np.flatnonzero(both.any(axis=(0, 1))).max())
    return _Start(both[:, :, :history], mine, np.stack(noised))


def _noised(scheduler: Any, call: int) -> np.ndarray:
    """Return the factors of a picture and of noise in what a scheduler makes of both for a call."""
    image, noise = (torch.tensor(each, dtype=torch.float64).view(1, 2, 1, 1) for each in ([1.0, 0.0], [0.0, 1.0]))
    timestep = scheduler.timesteps[call : call + 1]
    if hasattr(scheduler, "scale_noise"):
        return np.asarray(scheduler.scale_noise(image, timestep, noise).flatten().double().numpy())
    return np.asarray(scheduler.add_noise(image, noise, timestep).flatten().double().numpy())


def _newest_first(factors: np.ndarray) -> np.ndarray:
    """Return factors ``[calls, calls]`` of what was there at each call, by how many calls ago that was."""
    count = len(factors)
    result = np.zeros_like(factors)
    for call in range(count):
        result[call, : call + 1] = factors[call, call::-1]
    return result


def _composed(starts: Starts, sampler: Sampler) -> np.ndarray:
    """Return the sampler's table as the steps from call 0 make it."""
    units = np.eye(sampler.rows.shape[1])
    latents, outputs, drawn = [sampler.rows[0]], units[1 + sampler.draws :], iter(units[1 : 1 + sampler.draws])
    for call in range(sampler.calls):
        total = np.zeros(units.shape[1])
        for ago in range(min(starts.steps.shape[3], call + 1)):
            on_latent, on_output = starts.steps[0, call, :, ago]
            total += on_latent * latents[call - ago] + on_output * outputs[call - ago]
        if starts.draws[0, call]:
            total += starts.draws[0, call] * next(drawn)
        latents.append(total)
    return np.stack(latents)
