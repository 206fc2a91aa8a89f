"""Where latents come from and where they go: how drawn noise becomes one, and what the VAE is given of the last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dipgo.base.errors import UsageError
from dipgo.base.layout import Layout, find_layout
from dipgo.model.observed.log import Log, first_of
from dipgo.model.observed.request import Request
from dipgo.model.observed.stand_ins import output_like
from dipgo.model.observed.watch import Watch, watch

_TOLERANCE = 1e-4  # relative


@dataclass(frozen=True)
class Decoding:
    """What the VAE is given, of a final latent: laid out anew, times ``scale``, plus ``shift``, by channel."""

    layout: Layout
    scale: torch.Tensor
    shift: torch.Tensor

    def __call__(self, latent: torch.Tensor) -> torch.Tensor:
        moved = latent if self.layout.idle else self.layout(latent)
        return moved * self.scale.to(moved) + self.shift.to(moved)

    def inverse(self, given: torch.Tensor) -> torch.Tensor:
        """Return the latent of what the VAE is given."""
        latent = (given - self.shift.to(given)) / self.scale.to(given)
        return latent if self.layout.idle else self.layout.inverse(latent)


def noise_of(pipe: Any, request: Request, component: str, seen: Log) -> tuple[Layout, bool]:
    """Return how what is drawn becomes the latent, and whether the scheduler's own factor is on it."""
    drawn, latent = seen.drawn[0], seen.steps[0].latent
    numbers = torch.arange(drawn.numel(), dtype=torch.float32).view(drawn.shape) + 1
    how = Watch(component, steps=1, draw=lambda noise: numbers if noise.shape == drawn.shape else noise)
    moved = watch(pipe, request.inputs(pipe, component), how).steps[0].latent.double()
    factor = float(moved.abs().max()) / drawn.numel()
    places = torch.round(moved / factor).to(torch.int64).numpy() - 1
    layout = find_layout(places[0], tuple(drawn.shape[1:])) if len(places) == len(drawn) == 1 else None
    if layout is None or not near(layout(drawn).float() * factor, latent):
        raise UsageError(f"{type(pipe).__name__} makes its first latent of noise in a way of its own; not supported")
    sigma = float(getattr(pipe.scheduler, "init_noise_sigma", 1.0))
    if not min(abs(factor - 1), abs(factor - sigma)) < 1e-3 * factor:
        raise UsageError(f"{type(pipe).__name__} starts from noise of its own scale, {factor:g}; not supported")
    return layout, abs(factor - sigma) < 1e-3 * factor


def decoding_of(
    pipe: Any, request: Request, component: str, latent: torch.Tensor
) -> tuple[Decoding | None, tuple[int, int] | None]:
    """Return what the VAE is given, from what it is given of latents that are chosen, and the size of its images."""
    if getattr(pipe, "vae", None) is None:
        return None, (int(latent.shape[-2]), int(latent.shape[-1])) if latent.ndim == 4 else None

    def given(values: torch.Tensor) -> torch.Tensor | None:
        how = Watch(component, result=lambda result: values.to(result.dtype))
        return next(iter(watch(pipe, request.inputs(pipe, component), how).decoded), None)

    shift, one = given(torch.zeros_like(latent)), given(torch.ones_like(latent))
    places = torch.arange(latent.numel(), dtype=torch.float32).view(latent.shape)
    numbers = given(places)
    if shift is None or one is None or numbers is None or len(numbers) != len(latent):  # frames one by one
        return None, None
    scale = (one - shift).double()
    moved = torch.round((numbers.double() - shift) / scale).to(torch.int64).numpy()
    layout = find_layout(moved[0], tuple(latent.shape[1:]))
    if layout is None:
        raise UsageError(f"{type(pipe).__name__} decodes its latents in a way of its own; not supported")
    try:
        images = first_of(output_like(pipe.vae.decode, (shift,), {"return_dict": False}))
    except Exception:  # a VAE that cannot decode as it is, such as one that wants tiling switched on
        return None, None
    size = (int(images.shape[-2]), int(images.shape[-1]))
    if images.ndim != 4 and images.shape[2] != 1:  # frames, which no bundle decodes
        return None, size
    return Decoding(layout, _by_channel(scale), _by_channel(shift.double())), size


def _by_channel(values: torch.Tensor) -> torch.Tensor:
    """Return ``[1, C, 1, …]`` of values that are the same all over a channel."""
    return values.flatten(2)[:, :, :1].reshape(1, -1, *[1] * (values.ndim - 2)).float()


def near(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two latents are the same but for rounding."""
    if one.shape != other.shape:
        return False
    return bool(torch.linalg.norm(one.float() - other.float()) <= _TOLERANCE * torch.linalg.norm(other.float()))
