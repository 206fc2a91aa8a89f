"""Trajectories that begin with a picture, at a step of their own; and what of the picture inpainting keeps.

The host steps: a start has coefficients of its own, and inpainting changes x between steps. So graphs compute ε alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from engines.steps import Steps
from export.bundle import Bundle


@dataclass(frozen=True)
class Kept:
    """What inpainting keeps of a picture: where the mask is 0, x is the picture's own, with as much noise as x has.

    Attributes:
        latent, noise: of every image, ``[n, …]``.
        mask: 1 where x is free, of a shape that spreads to theirs.
    """

    latent: np.ndarray
    noise: np.ndarray
    mask: np.ndarray


@dataclass(frozen=True)
class Origin:
    """Where trajectories begin.

    Attributes:
        step: the first call of the denoiser.
        latent: x before it, float32 ``[n, …]``.
        drawn: what the sampler draws from there on, ``[n, draws, …]``.
        kept: of the picture, after every step.
    """

    step: int
    latent: np.ndarray
    drawn: np.ndarray
    kept: Kept | None = None

    def of(self, images: np.ndarray) -> Origin:
        """Return the origin of some images, by their numbers."""
        kept = self.kept and Kept(self.kept.latent[images], self.kept.noise[images], self.kept.mask[images])
        return replace(self, latent=self.latent[images], drawn=self.drawn[images], kept=kept)


class LaterWalk:
    """A walk over the steps from an origin on, as :class:`engines.steps.Walk` is one from noise; in float64.

    Attributes:
        step: the next one; after the last, how many there are.
        first: of the trajectory.
    """

    def __init__(self, steps: Steps, origin: Origin) -> None:
        tables = steps.bundle.tables
        self.steps, self.first, self.step, self.origin = steps, origin.step, origin.step, origin
        self._factors, self._draws = tables["start.steps"][origin.step], tables["start.draws"][origin.step]
        self._scale = tables["solver.input_scale"]
        self._in_graphs = steps.record.solver.kind == "graph"  # which then scale x themselves
        self._latents, self._outputs = [origin.latent.astype(np.float64)], list[np.ndarray]()  # the newest first
        self._drawn = 0

    def advance(self) -> None:
        """Do the next step."""
        step, first = self.step, self.step == self.first
        if first or self.steps.record.steps[step].launches:
            scale = 1.0 if self._in_graphs else self._scale[step]
            self.steps.write(step, (scale * self._latents[0]).astype(np.float32))
        self.steps.start(step) if first else self.steps.launch(step)
        history = self._factors.shape[2]
        self._outputs = [self.steps.epsilon(step).astype(np.float64), *self._outputs[: history - 1]]
        after = np.zeros_like(self._latents[0])
        for past, values in enumerate((self._latents, self._outputs)):
            for factor, value in zip(self._factors[step, past], values, strict=False):
                if factor:
                    after += factor * value
        if self._draws[step]:
            after += self._draws[step] * self.origin.drawn[:, self._drawn]
            self._drawn += 1
        if self.origin.kept:
            after = _with_kept(self.origin.kept, after, factors_of_noise(self.steps.bundle, step + 1))
        self._latents = [after, *self._latents[: history - 1]]
        self.step = step + 1

    @property
    def latent(self) -> np.ndarray:
        """x before :attr:`step`, float32 ``[n, C, H, W]``, an array of its own."""
        return self._latents[0].astype(np.float32)


def factors_of_noise(bundle: Bundle, step: int) -> np.ndarray:
    """Return the factors of a picture and of noise in x before a step; of the picture alone after the last."""
    table = bundle.tables["start.noised"]
    return np.asarray(table[step] if step < len(table) else [1.0, 0.0])


def _with_kept(kept: Kept, latent: np.ndarray, factors: np.ndarray) -> np.ndarray:
    own = factors[0] * kept.latent + factors[1] * kept.noise
    return np.asarray((1 - kept.mask) * own + kept.mask * latent)
