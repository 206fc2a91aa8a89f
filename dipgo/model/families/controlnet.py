"""ControlNet (Zhang et al. 2023) on UNets: one or several, and the UNet, are one denoiser with two more conditions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, lru_cache
from inspect import signature
from typing import Any

import torch
from torch import nn

from dipgo.base.control import PICTURE, STRENGTH, drawings
from dipgo.base.errors import UsageError
from dipgo.model.families.family import Conditions, Family, latent_size
from dipgo.model.families.unet import UNET
from dipgo.model.settings import own_settings

NETS = "controlnets"
"""The entry of a denoiser's configuration that holds those of its ControlNets."""
KINDS = ("ControlNetModel", "MultiControlNetModel")
_SHARED = ("block_out_channels", "cross_attention_dim", "layers_per_block")
_EMBEDDING = (16, 32, 96, 256)  # what a ControlNet makes of a picture on the way to the latent's size, by default


def nets_of(controlnet: Any) -> list[Any]:
    """Return the single ControlNets of a pipeline's component."""
    controlnet = getattr(controlnet, "_orig_mod", controlnet)  # what torch.compile has inside
    return [getattr(net, "_orig_mod", net) for net in getattr(controlnet, "nets", [controlnet])]


def with_nets(unet: Any, controlnet: Any) -> Any:
    """Return a UNet whose ``forward`` runs a ControlNet first, and takes a ControlNet's arguments too.

    All modules are shared: those of the UNet have the names that they have there, those of the ControlNet lie in
    ``controlnet``, of several in ``controlnet.nets.0``, ….
    """
    nets = nets_of(controlnet)
    kind: Any = type(unet)
    whole: Any = object.__new__(_with_nets(kind))
    hooks = {name: value.copy() for name, value in vars(unet).items() if name.endswith("_hooks")}
    whole.__dict__ = {**vars(unet), **hooks, "_modules": dict(unet._modules)}
    whole.__dict__.pop("forward", None)
    whole.controlnet = getattr(controlnet, "_orig_mod", controlnet) if len(nets) > 1 else nets[0]
    own = [own_settings(type(net), json.loads(net.to_json_string())) for net in nets]
    whole._internal_dict = type(unet.config)({**unet.config, NETS: own})
    return whole


def folders_of_nets(count: int) -> dict[str, str]:
    """Return the folders of ``count`` ControlNets in a pipeline's, by what stands before their modules' names."""
    if count == 1:
        return {"controlnet.": "controlnet"}
    return {f"controlnet.nets.{net}.": "controlnet" + (f"_{net}" if net else "") for net in range(count)}


@cache
def _with_nets(kind: Any) -> Any:
    class Controlled(kind):
        def forward(
            self,
            sample: torch.Tensor,
            timestep: torch.Tensor,
            encoder_hidden_states: torch.Tensor,
            controlnet_cond: torch.Tensor,
            conditioning_scale: torch.Tensor,
            added_cond_kwargs: dict[str, torch.Tensor] | None = None,
            return_dict: bool = True,
        ) -> Any:
            count = len(nets_of(self.controlnet))
            pictures, scales = controlnet_cond.chunk(count, 1), conditioning_scale.split(1, 1)
            shared = {"encoder_hidden_states": encoder_hidden_states, "added_cond_kwargs": added_cond_kwargs}
            down, middle = self.controlnet(
                sample,
                timestep,
                controlnet_cond=pictures if count > 1 else pictures[0],
                conditioning_scale=scales if count > 1 else scales[0],
                return_dict=False,
                **shared,
            )
            residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
            return super().forward(sample, timestep, **shared, **residuals, return_dict=return_dict)

    Controlled.__name__ = Controlled.__qualname__ = kind.__name__
    return Controlled


def check_nets(unet: Mapping[str, Any], nets: Sequence[Mapping[str, Any]], where: str) -> None:
    """Refuse ControlNets that were not made for a UNet, by their configurations.

    Raises:
        UsageError: naming what differs.
    """
    from diffusers import ControlNetModel, UNet2DConditionModel

    for net in nets:
        if net.get("global_pool_conditions"):
            raise UsageError(f"{where}: the ControlNet pools what it adds (guess mode), which is not supported")
        for entry in _SHARED:
            own, theirs = _setting(UNet2DConditionModel, unet, entry), _setting(ControlNetModel, net, entry)
            if own != theirs:
                raise UsageError(
                    f"{where}: the ControlNet is another model's: its {entry} is {theirs}, the UNet's {own}; take one "
                    "that was trained for this UNet"
                )


def _setting(kind: Any, config: Mapping[str, Any], entry: str) -> Any:
    value = config.get(entry, signature(kind.__init__).parameters[entry].default)
    return list(value) if isinstance(value, tuple) else value


def picture_shape(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return channels, height and width of the pictures of a denoiser's ControlNets."""
    nets = config[NETS]
    cell = 2 ** (len(nets[0].get("conditioning_embedding_out_channels", _EMBEDDING)) - 1)
    height, width = latent_size(config)
    return nets[0].get("conditioning_channels", 3), cell * height, cell * width


def _example(config: Mapping[str, Any], rows: int) -> Conditions:
    channels, *size = picture_shape(config)
    nets = len(config[NETS])
    pictures, strengths = torch.zeros(rows, channels * nets, *size), torch.ones(rows, nets, 1, 1)
    return UNET.example(config, rows) | {PICTURE: pictures, STRENGTH: strengths}


def _encode(pipe: Any, prompts: Sequence[Any]) -> tuple[Conditions, Conditions]:
    denoiser: Any = CONTROLNET.denoiser(pipe)
    config = denoiser.config
    channels, *size = picture_shape(config)
    nets = len(config[NETS])
    pictures = torch.from_numpy(drawings(prompts, nets, (size[0], size[1]), channels))
    own = {PICTURE: pictures.to(pipe.device), STRENGTH: torch.ones(len(prompts), nets, 1, 1, device=pipe.device)}
    unconditional, conditional = UNET.encode(pipe, prompts)
    return unconditional | own, conditional | own


def _call(denoiser: nn.Module, sample: torch.Tensor, timestep: torch.Tensor, given: Conditions) -> torch.Tensor:
    added = {name: value for name, value in given.items() if name not in (_TEXT, PICTURE, STRENGTH)}
    pictures = given[PICTURE], given[STRENGTH]
    return denoiser(sample, timestep, given[_TEXT], *pictures, added_cond_kwargs=added or None, return_dict=False)[0]


def _besides(pipe: Any, prompts: Sequence[Any], size: tuple[int, int]) -> dict[str, Any]:
    nets = nets_of(pipe.controlnet)
    pictures = torch.from_numpy(drawings(prompts, len(nets), size, nets[0].config.conditioning_channels))
    return {"image": list(pictures.chunk(len(nets), 1)) if hasattr(pipe.controlnet, "nets") else pictures}


def _sites() -> dict[str, tuple[str, ...]]:
    """Return the UNet's sites, and those of the ControlNets that have the same names inside."""
    return {
        granularity: (
            *own,
            *(f"{place}.{each}" for place in _PLACES for each in own if not each.startswith(_UNETS_OWN)),
        )
        for granularity, own in UNET.sites.items()
    }


_PLACES = ("controlnet", "controlnet.nets.*")
_UNETS_OWN = ("up_blocks", "conv_out")
_TEXT = "encoder_hidden_states"

CONTROLNET = replace(
    UNET,
    pipelines=("StableDiffusionControlNetPipeline", "StableDiffusionXLControlNetPipeline"),
    sites=_sites(),
    encode=_encode,
    example=_example,
    call=_call,
    whole=lambda pipe: with_nets(getattr(pipe.unet, "_orig_mod", pipe.unet), pipe.controlnet),
    besides=_besides,
)


@lru_cache
def controlled_by(nets: int) -> Family:
    """Return the family of UNets with so many ControlNets."""
    return replace(CONTROLNET, fixed={STRENGTH: torch.ones(1, nets, 1, 1)})
