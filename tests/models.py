"""Models and SubNets made for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from dipgo.cost import cost_of
from dipgo.families import FAMILIES
from dipgo.gating import backup_name
from dipgo.models import Model
from dipgo.records import SamplerIdentity
from dipgo.sampler import Sampler
from dipgo.subnet import SubNet
from dipgo.trace import Trace


def tiny_unet(folder: Path) -> Model:
    """Save a UNet with SD-1.5's block types (three resolutions, cross-attention) and random weights."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    for parameter in unet.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    unet.save_pretrained(folder / "unet")
    family = next(family for family in FAMILIES if family.denoiser_class == "UNet2DConditionModel")
    return Model("tiny-unet", folder, family, dict(unet.config))


def tiny_vae() -> AutoencoderKL:
    """Return a decoder for latents of four channels."""
    torch.manual_seed(1)
    return AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4, sample_size=8)


def random_subnet(
    trace: Trace, sampler: Sampler, seed: int, keep: float = 0.5, terms: int = 1, channels: int | None = None
) -> SubNet:
    """Draw gates; with ``terms`` above 1 or ``channels`` also backup weights (per channel, or scalars if 0)."""
    generator = np.random.default_rng(seed)
    gates = generator.random((sampler.calls, len(trace.sites))) < keep
    gates[0] = True
    weights: dict[str, np.ndarray] = {}
    if channels is not None:
        for site, outputs in zip(trace.sites, trace.outputs, strict=True):
            for output, name in enumerate(outputs):
                width = [trace.shape(name, 1)[site.channel_axis]] if channels else []
                drawn = generator.normal(1 / terms, 0.2, (sampler.calls, terms, *width))
                weights[backup_name(site.name, output)] = drawn.astype(np.float32)
    identity = SamplerIdentity(
        class_name=sampler.name,
        config=sampler.config,
        steps=sampler.steps,
        timesteps=list(sampler.timesteps),
        guidance_scale=trace.guidance_scale,
    )
    return SubNet(
        trace.model.identity(), identity, trace.sites, gates, cost_of(trace, gates, bool(weights)), terms, weights
    )
