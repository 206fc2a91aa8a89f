"""``emoji-sd``: its parts in their sizes, put together as a Stable Diffusion 1.5 pipeline, and how it is sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from training.emoji_tokenizer import LENGTH
from training.sampling import draw

NOISE = {  # of Stable Diffusion 1.5
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "prediction_type": "epsilon",
}


@dataclass(frozen=True)
class Size:
    """How large the model is and how long it is trained. Channels are those of the three resolutions."""

    vae: tuple[int, int, int]
    unet: tuple[int, int, int]
    layers: int
    heads: int
    text_width: int
    text_layers: int
    words: int
    vae_course: tuple[int, int, float]  # iterations, batch, rate
    unet_course: tuple[int, int, float]
    mirrored: bool  # train the UNet on mirrored pictures too, where the name allows it
    steps: int  # DDIM steps of the samples along the way; twice as many in the end


FULL = Size((32, 64, 128), (48, 96, 192), 2, 3, 160, 3, 2048, (3000, 64, 2e-3), (5500, 256, 1e-3), True, 25)
SMALL = Size((24, 48, 96), (48, 96, 192), 2, 3, 128, 2, 2048, (2000, 16, 2e-3), (3500, 32, 1e-3), False, 25)
TRIAL = Size((8, 8, 8), (16, 16, 16), 1, 2, 16, 1, 600, (30, 4, 2e-3), (30, 4, 1e-3), True, 2)


def new_vae(size: Size) -> AutoencoderKL:
    """Return an autoencoder of images 64x64x3 and latents 16x16x4."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=size.vae,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
    )


def new_unet(size: Size) -> UNet2DConditionModel:
    """Return a UNet with Stable Diffusion 1.5's block types at three resolutions: 16, 8 and 4."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=size.unet,
        layers_per_block=size.layers,
        attention_head_dim=size.heads,  # the number of heads, as in Stable Diffusion 1.5
        cross_attention_dim=size.text_width,
        norm_num_groups=16,
    )


def new_text_encoder(width: int, layers: int, tokenizer: CLIPTokenizer, length: int = LENGTH) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 32),
        max_position_embeddings=length,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


class TextToImage(nn.Module):
    """Text encoder and UNet, trained as one: noisy latents ``[n, 4, 16, 16]`` and token ids ``[n, 77]`` to ε."""

    def __init__(self, text: CLIPTextModel, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.text, self.unet = text, unet

    def forward(self, noisy: torch.Tensor, timestep: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self.unet(noisy, timestep, self.text(ids).last_hidden_state).sample


class Reconstruction(nn.Module):
    """The autoencoder as it is trained: images ``[n, 3, 64, 64]`` and noise like the latents to images again.

    Also returns the latents' means and log variances; all in float32, computed in bfloat16 where ``halved``.
    """

    def __init__(self, vae: AutoencoderKL, halved: bool) -> None:
        super().__init__()
        self.vae, self.halved = vae, halved

    def forward(self, images: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with _autocast(images, self.halved):
            posterior = self.vae.encode(images).latent_dist
            decoded = self.vae.decode(posterior.mean + posterior.std * noise).sample
        return decoded.float(), posterior.mean.float(), posterior.logvar.float()


class Denoising(nn.Module):
    """Text encoder and UNet as they are trained: ε in float32, computed in bfloat16 where ``halved``."""

    def __init__(self, model: TextToImage, halved: bool) -> None:
        super().__init__()
        self.model, self.halved = model, halved

    def forward(self, noisy: torch.Tensor, timestep: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        with _autocast(noisy, self.halved):
            predicted: torch.Tensor = self.model(noisy, timestep, ids)
        return predicted.float()


def reconstruction_loss(
    picture: torch.Tensor, decoded: torch.Tensor, mean: torch.Tensor, log: torch.Tensor, divergence: float = 1e-4
) -> torch.Tensor:
    """Return the loss of what :class:`Reconstruction` returns, with so much of the latents' divergence from noise."""
    apart = 0.5 * (mean.square() + log.exp() - 1 - log).mean()
    return F.mse_loss(decoded, picture) + 0.1 * F.l1_loss(decoded, picture) + divergence * apart


def _autocast(like: torch.Tensor, enabled: bool) -> torch.autocast:
    # Without the cache of cast weights, which must not outlive a CUDA graph.
    return torch.autocast(like.device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)


def token_ids(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> torch.Tensor:
    """Return ``[n, 77]`` int64, padded and cut as the pipeline does."""
    return tokenizer(list(texts), padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")[
        "input_ids"
    ]


@torch.no_grad()
def encode(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Return the latents' means, not scaled, a few images at a time."""
    return torch.cat([vae.encode(part).latent_dist.mean for part in images.split(64)])


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Return images in [-1, 1] of latents that are not scaled."""
    return torch.cat([vae.decode(part).sample.clamp(-1, 1) for part in latents.split(64)])


def assemble(model: TextToImage, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
    """Return the pipeline, with Stable Diffusion 1.5's scheduler."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=model.text.eval(),
        tokenizer=tokenizer,
        unet=model.unet.eval(),
        # As in Stable Diffusion 1.5's file, which tells other schedulers not to clip.
        scheduler=PNDMScheduler.from_config({**NOISE, "skip_prk_steps": True, "clip_sample": False}),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sample(
    pipe: StableDiffusionPipeline, prompts: Sequence[str], steps: int, guidance: float, seed: int = 0, batch: int = 50
) -> torch.Tensor:
    """Return one image a prompt, float32 ``[n, 3, 64, 64]`` in [-1, 1], by DDIM; see :func:`~.sampling.draw`."""
    scheduler, pipe.scheduler = pipe.scheduler, DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    images = draw(pipe, prompts, seed, batch, num_inference_steps=steps, guidance_scale=guidance)
    pipe.scheduler = scheduler
    return images
