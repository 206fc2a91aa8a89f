"""The families of denoisers: how each is called, what conditions it, and which of its modules are sites.

A family is the only place that knows a model class by name. To support another class, add one entry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dipgo.errors import UsageError

Conditions = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Family:
    """One class of denoiser.

    Attributes:
        denoiser_class: name of the diffusers model class.
        component: attribute of the pipeline that holds it.
        conditioned_by: ``"class"`` or ``"prompt"``.
        sites: module name patterns by granularity; ``*`` stands for one part of a dotted name.
        granularity: the default granularity.
        conditions: ``(pipeline, labels or prompts) -> conditions`` of the unconditional half, then the conditional.
        example: ``(denoiser config, rows) -> conditions`` of the right shapes and dtypes, for tracing.
        call: ``(denoiser, sample, timestep [B], conditions) -> model output``.
        scales_noise: whether the pipeline multiplies the initial noise by the scheduler's ``init_noise_sigma``.
        null_class: the label of the unconditional half, where classes condition.
        labels: ``pipeline -> {name: class}``.
    """

    denoiser_class: str
    component: str
    conditioned_by: str
    sites: Mapping[str, Sequence[str]]
    granularity: str
    conditions: Callable[[Any, Sequence[Any]], tuple[Conditions, Conditions]]
    example: Callable[[Mapping[str, Any], int], Conditions]
    call: Callable[[nn.Module, torch.Tensor, torch.Tensor, Conditions], torch.Tensor]
    scales_noise: bool = True
    null_class: int | None = None
    labels: Callable[[Any], dict[str, int]] = field(default=lambda pipe: {})


DIT_NULL_CLASS = 1000  # the label of the unconditional half that DiTPipeline hard-codes


def _dit_conditions(pipe: Any, labels: Sequence[int]) -> tuple[Conditions, Conditions]:
    conditional = torch.as_tensor(list(labels), dtype=torch.int64)
    return {"class_labels": torch.full_like(conditional, DIT_NULL_CLASS)}, {"class_labels": conditional}


def _dit_call(denoiser: nn.Module, sample: torch.Tensor, timestep: torch.Tensor, given: Conditions) -> torch.Tensor:
    return denoiser(sample, timestep=timestep, class_labels=given["class_labels"], return_dict=False)[0]


def _unet_conditions(pipe: Any, prompts: Sequence[str]) -> tuple[Conditions, Conditions]:
    conditional, unconditional = pipe.encode_prompt(list(prompts), pipe.device, 1, True)
    return {"encoder_hidden_states": unconditional}, {"encoder_hidden_states": conditional}


def _unet_call(denoiser: nn.Module, sample: torch.Tensor, timestep: torch.Tensor, given: Conditions) -> torch.Tensor:
    return denoiser(sample, timestep, given["encoder_hidden_states"], return_dict=False)[0]


FAMILIES = (
    Family(
        denoiser_class="DiTTransformer2DModel",
        component="transformer",
        conditioned_by="class",
        sites={
            "block": ("transformer_blocks.*",),
            "branch": ("transformer_blocks.*",),
            "layer": ("transformer_blocks.*.attn1", "transformer_blocks.*.ff", "proj_out_2"),
        },
        granularity="layer",
        conditions=_dit_conditions,
        example=lambda config, rows: {"class_labels": torch.zeros(rows, dtype=torch.int64)},
        call=_dit_call,
        scales_noise=False,
        null_class=DIT_NULL_CLASS,
        labels=lambda pipe: dict(pipe.labels),
    ),
    Family(
        denoiser_class="UNet2DConditionModel",
        component="unet",
        conditioned_by="prompt",
        sites={"block": ("down_blocks.*", "mid_block", "up_blocks.*")},
        granularity="block",
        conditions=_unet_conditions,
        example=lambda config, rows: {"encoder_hidden_states": torch.zeros(rows, 77, config["cross_attention_dim"])},
        call=_unet_call,
    ),
)


def family_of(pipe: Any) -> Family:
    """Return the family of a pipeline's denoiser.

    Raises:
        UsageError: no registered family has this class.
    """
    for family in FAMILIES:
        denoiser = getattr(pipe, family.component, None)
        if type(denoiser).__name__ == family.denoiser_class:
            return family
    known = ", ".join(family.denoiser_class for family in FAMILIES)
    raise UsageError(f"{type(pipe).__name__} holds no denoiser that dipgo knows; supported: {known}")


class GuidedDenoiser(nn.Module):
    """A denoiser as one function from latent to guided ε: doubling, the call, guidance, dropping a learned variance.

    ``forward(latent [B, C, H, W], timestep [B] float32, conditions)`` returns ε ``[B, C, H, W]``. With guidance the
    conditions hold the unconditional half first, ``2 B`` rows in all (Ho & Salimans 2022, eq. 6 in diffusers' form:
    ε = ε_u + s (ε_c - ε_u)). ``guidance_scale <= 1`` switches it off, as diffusers does.
    """

    def __init__(self, denoiser: nn.Module, family: Family, guidance_scale: float) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.call = family.call
        self.guidance_scale = guidance_scale

    @property
    def guided(self) -> bool:
        return self.guidance_scale > 1

    def forward(self, latent: torch.Tensor, timestep: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        if not self.guided:
            return self.call(self.denoiser, latent, timestep, conditions)[:, : latent.shape[1]]
        sample, moment = torch.cat([latent, latent]), torch.cat([timestep, timestep])
        output = self.call(self.denoiser, sample, moment, conditions)[:, : latent.shape[1]]
        unconditional, conditional = output.chunk(2)
        return unconditional + self.guidance_scale * (conditional - unconditional)


def join(unconditional: Conditions, conditional: Conditions, guided: bool) -> Conditions:
    """Stack both halves along the batch, the unconditional first; without guidance, the conditional alone."""
    if not guided:
        return conditional
    return {name: torch.cat([unconditional[name], conditional[name]]) for name in conditional}
