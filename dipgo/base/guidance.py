"""The scale of classifier-free guidance, and what goes with it. Free of torch."""

from __future__ import annotations

import math
from typing import Literal

from dipgo.base.errors import UsageError

ScaleArgument = Literal["guidance_scale", "true_cfg_scale"]
"""What a diffusers pipeline calls the guidance scale."""

SCALE = "guidance_scale"
RESCALE = "guidance_rescale"
"""Conditions of a denoiser whose guidance a request chooses, one row of the batch each, as a latent has axes."""


class GuidanceScale(float):
    """A guidance scale that also says how far guided outputs are rescaled, and for which scales around it one learns.

    Attributes:
        rescale: from 0, not at all, to 1: how far a guided output has the standard deviation of the conditional one
            (Lin et al. 2024, "Common Diffusion Noise Schedules and Sample Steps are Flawed", section 3.4).
        spread: how far scales may be from it that a search is for.
    """

    rescale: float
    spread: float

    def __new__(cls, scale: float, rescale: float = 0.0, spread: float = 0.0) -> GuidanceScale:
        value = super().__new__(cls, scale)
        value.rescale, value.spread = rescale, spread
        return value


def guidance_of(text: str | None, rescale: float) -> GuidanceScale | None:
    """Read a scale, or a range of scales ``LOW:HIGH``; None, the pipeline's own, where nothing is given.

    Raises:
        UsageError: no number or range, or a rescale without a scale.
    """
    if text is None:
        if rescale:
            raise UsageError(f"--guidance-rescale {rescale:g} is given without --guidance; give both")
        return None
    try:
        low, high = scales_of(text)
    except ValueError as error:
        raise UsageError(f"--guidance {text}: {error}") from error
    return GuidanceScale((low + high) / 2, rescale, (high - low) / 2)


def scales_of(text: str) -> tuple[float, float]:
    """Read the least and the largest guidance scale of ``LOW:HIGH``, or of a number.

    Raises:
        ValueError: with what to give.
    """
    low, colon, high = text.partition(":")
    try:
        ends = float(low), float(high if colon else low)
    except ValueError:
        ends = 1.0, 0.0
    if not ends[0] <= ends[1] or not math.isfinite(ends[1] - ends[0]):
        raise ValueError("give a finite number, or a range of them such as 5:9")
    return ends


def rescale_of(scale: float) -> float:
    """Return how far a guidance scale rescales; a plain number does not."""
    return getattr(scale, "rescale", 0.0)


def spread_of(scale: float) -> float:
    """Return how far scales may be from a guidance scale that a search is for."""
    return getattr(scale, "spread", 0.0)
