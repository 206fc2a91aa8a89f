"""Classifier-free guidance: one output of the conditional and the unconditional pass."""

from __future__ import annotations

import torch

Number = float | torch.Tensor
"""A number, or a tensor of one for each image."""


def guided(
    unconditional: torch.Tensor, conditional: torch.Tensor, scale: Number, rescale: Number = 0.0
) -> torch.Tensor:
    """Return the guided output of both passes: ε_u + s (ε_c - ε_u) (Ho & Salimans 2022, eq. 6 in diffusers' form).

    ``rescale`` as :func:`rescaled` has it.
    """
    return rescaled(unconditional + scale * (conditional - unconditional), conditional, rescale)


def rescaled(output: torch.Tensor, conditional: torch.Tensor, rescale: Number) -> torch.Tensor:
    """Return a guided output that has the conditional one's standard deviation, as far as ``rescale`` says.

    From 0, not at all, to 1 (Lin et al. 2024, "Common Diffusion Noise Schedules and Sample Steps are Flawed",
    section 3.4).
    """
    if not isinstance(rescale, torch.Tensor) and not rescale:
        return output
    axes = list(range(1, output.ndim))
    deviations = conditional.std(dim=axes, keepdim=True) / output.std(dim=axes, keepdim=True)
    return output * (rescale * deviations + (1 - rescale))


def all_passes(value: torch.Tensor, passes: int) -> torch.Tensor:
    """Return the rows of all passes of a condition ``[2 B, …]``: a third pass has those of the second."""
    return torch.cat([value, value.chunk(2)[1]]) if passes == 3 else value
