"""The scale of classifier-free guidance, and what goes with it. Free of torch."""

from __future__ import annotations

from dipgo.base.errors import UsageError

SCALE = "guidance_scale"
RESCALE = "guidance_rescale"
"""Conditions of a denoiser whose guidance a request chooses, one row of the batch each, as a latent has axes."""


class GuidanceScale(float):
    """A guidance scale that also says how far guided outputs are rescaled.

    Attributes:
        rescale: from 0, not at all, to 1: how far a guided output has the standard deviation of the conditional one
            (Lin et al. 2024, "Common Diffusion Noise Schedules and Sample Steps are Flawed", section 3.4).
    """

    rescale: float

    def __new__(cls, scale: float, rescale: float = 0.0) -> GuidanceScale:
        value = super().__new__(cls, scale)
        value.rescale = rescale
        return value


def guidance_of(scale: float | None, rescale: float) -> float | None:
    """Return a scale with its rescale; None, the pipeline's own, where neither is given.

    Raises:
        UsageError: a rescale without a scale.
    """
    if scale is None and rescale:
        raise UsageError(f"--guidance-rescale {rescale:g} is given without --guidance; give both")
    return None if scale is None else GuidanceScale(scale, rescale)


def rescale_of(scale: float) -> float:
    """Return how far a guidance scale rescales; a plain number does not."""
    return getattr(scale, "rescale", 0.0)
