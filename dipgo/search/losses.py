"""How far a gated trajectory is from the full one. Both are lists of latents after 0, 1, … calls."""

from __future__ import annotations

import torch


def final_latent(latents: list[torch.Tensor], target: list[torch.Tensor]) -> torch.Tensor:
    """Mean squared error of the final latents, relative to their mean square."""
    return (latents[-1] - target[-1]).square().mean() / target[-1].square().mean()


def psnr(images: torch.Tensor, reference: torch.Tensor, span: float = 2.0) -> float:
    """Return 10 log10(span² / MSE) in dB over all pixels together; images are clamped to [-span/2, span/2]."""
    half = span / 2
    error = (images.clamp(-half, half) - reference.clamp(-half, half)).square().mean().item()
    return float("inf") if error == 0 else float(10 * torch.log10(torch.tensor(span**2 / error)))
