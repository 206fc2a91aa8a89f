"""Latents in the scale of the denoiser, and in that of the VAE."""

from __future__ import annotations

from typing import Any

import torch


def to_vae(latents: torch.Tensor, config: Any) -> torch.Tensor:
    """Return latents ``[B, C, H, W]`` as the VAE of this configuration decodes them; as diffusers' pipelines do it."""
    if spread := _spread(config, latents):
        mean, deviation = spread
        return latents * deviation / config.scaling_factor + mean
    shift = getattr(config, "shift_factor", None)
    return latents / config.scaling_factor + shift if shift else latents / config.scaling_factor


def from_vae(latents: torch.Tensor, config: Any) -> torch.Tensor:
    """Return what :func:`to_vae` makes these latents of."""
    if spread := _spread(config, latents):
        mean, deviation = spread
        return (latents - mean) * config.scaling_factor / deviation
    return (latents - (getattr(config, "shift_factor", None) or 0.0)) * config.scaling_factor


def _spread(config: Any, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return mean and standard deviation by channel, where the VAE has them."""
    mean, deviation = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is None or deviation is None:
        return None
    of = [torch.tensor(values, dtype=like.dtype, device=like.device).view(1, -1, 1, 1) for values in (mean, deviation)]
    return of[0], of[1]
