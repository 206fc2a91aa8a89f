"""A small FLUX.1-dev: its parts in their sizes, put together as a ``FluxPipeline``, and how it is sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from training.sampling import draw

LENGTH = 16  # tokens of a text in T5; FLUX.1-dev has 512, which would be most of what so small a model computes
CHANNELS = 16  # of latents; packed two by two
STEPS, GUIDANCE = 28, 3.5  # FluxPipeline's own
GUIDANCES = (1.0, 6.0)  # that guidance is learned between

SCHEDULER = {  # of FLUX.1-dev
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}


@dataclass(frozen=True)
class Size:
    """How large the model is and how long it is trained. Courses are iterations, batch and rate.

    ``vae`` are the channels at the picture's side, a half and a quarter of it; heads are 32 wide.
    """

    vae: tuple[int, int, int]
    heads: int
    double_blocks: int
    single_blocks: int
    text_width: int
    text_layers: int
    words: int
    vae_course: tuple[int, int, float]
    flow_course: tuple[int, int, float]
    guidance_course: tuple[int, int, float]


DIGITS = Size((16, 32, 32), 4, 2, 4, 64, 2, 600, (500, 32, 2e-3), (2100, 64, 1e-3), (220, 64, 4e-4))
EMOJI = Size((32, 64, 128), 6, 4, 8, 160, 3, 2048, (3000, 64, 2e-3), (8000, 256, 1e-3), (2000, 256, 3e-4))
TRIAL = Size((8, 8, 8), 1, 1, 1, 16, 1, 600, (12, 4, 2e-3), (12, 4, 1e-3), (12, 4, 1e-3))


def new_vae(size: Size, side: int) -> AutoencoderKL:
    """Return an autoencoder as FLUX.1-dev's, of pictures ``side`` wide to latents of a quarter of it."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=size.vae,
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=8,
        sample_size=side,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def new_t5(size: Size, tokenizer: T5Tokenizer) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=size.text_width,
        d_kv=32,
        num_heads=max(1, size.text_width // 32),
        d_ff=2 * size.text_width,
        num_layers=size.text_layers,
        feed_forward_proj="gated-gelu",  # as T5 1.1 has it
        dropout_rate=0.0,
        tie_word_embeddings=False,
    )
    return T5EncoderModel(config)


def new_transformer(size: Size) -> FluxTransformer2DModel:
    """Return the transformer, each block of which starts as the identity (adaLN-zero); diffusers draws at random."""
    transformer = FluxTransformer2DModel(
        in_channels=4 * CHANNELS,
        num_layers=size.double_blocks,
        num_single_layers=size.single_blocks,
        attention_head_dim=32,
        num_attention_heads=size.heads,
        joint_attention_dim=size.text_width,
        pooled_projection_dim=size.text_width,
        guidance_embeds=True,
        axes_dims_rope=(4, 14, 14),  # in FLUX.1-dev's proportions
    )
    modulations = [
        *(norm.linear for block in transformer.transformer_blocks for norm in (block.norm1, block.norm1_context)),
        *(block.norm.linear for block in transformer.single_transformer_blocks),
        transformer.norm_out.linear,
        transformer.proj_out,
    ]
    for layer in modulations:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return transformer


class Flow(nn.Module):
    """Text encoders and transformer as one: packed noisy latents ``[n, tokens, 64]`` to their velocity.

    ``sigma`` and ``guidance`` are float32 ``[n]``, ``clip`` and ``t5`` token ids ``[n, length]``.
    """

    def __init__(self, clip: CLIPTextModel, t5: T5EncoderModel, transformer: FluxTransformer2DModel) -> None:
        super().__init__()
        self.clip, self.t5, self.transformer = clip, t5, transformer

    def encode(self, clip: torch.Tensor, t5: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return T5's states ``[n, length, width]`` and CLIP's pooled ones ``[n, width]``."""
        return self.t5(t5).last_hidden_state, self.clip(clip).pooler_output

    def velocity(
        self,
        noisy: torch.Tensor,
        sigma: torch.Tensor,
        guidance: torch.Tensor,
        states: torch.Tensor,
        pooled: torch.Tensor,
    ) -> torch.Tensor:
        side = round(noisy.shape[1] ** 0.5)
        return self.transformer(
            hidden_states=noisy,
            timestep=sigma,
            guidance=guidance,
            encoder_hidden_states=states,
            pooled_projections=pooled,
            txt_ids=states.new_zeros(states.shape[1], 3),
            img_ids=FluxPipeline._prepare_latent_image_ids(len(noisy), side, side, noisy.device, noisy.dtype),
        ).sample

    def forward(
        self, noisy: torch.Tensor, sigma: torch.Tensor, guidance: torch.Tensor, clip: torch.Tensor, t5: torch.Tensor
    ) -> torch.Tensor:
        return self.velocity(noisy, sigma, guidance, *self.encode(clip, t5))


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Return latents ``[n, 16, h, w]`` as the pipeline packs them: ``[n, h w / 4, 64]``."""
    packed: torch.Tensor = FluxPipeline._pack_latents(latents, *latents.shape)
    return packed


def draw_sigmas(count: int, tokens: int, generator: torch.Generator) -> torch.Tensor:
    """Return noise levels ``[count]``: logit-normal, then shifted as the scheduler shifts those of so many tokens."""
    scheduler = FlowMatchEulerDiscreteScheduler(**SCHEDULER)
    shift = calculate_shift(tokens)  # at its defaults, which are the scheduler's
    drawn = torch.randn(count, generator=generator, device=generator.device).sigmoid().clamp(1e-4, 1 - 1e-4)
    shifted: torch.Tensor = scheduler.time_shift(shift, 1.0, drawn)
    return shifted


def token_ids(tokenizer: CLIPTokenizer | T5Tokenizer, texts: Sequence[str], length: int) -> torch.Tensor:
    """Return ``[n, length]`` int64, padded and cut as the pipeline does."""
    options = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
    ids: torch.Tensor = tokenizer(list(texts), **options)["input_ids"]
    return ids


def assemble(model: Flow, vae: AutoencoderKL, tokenizer: CLIPTokenizer, tokenizer_2: T5Tokenizer) -> FluxPipeline:
    """Return the pipeline, with FLUX.1-dev's scheduler."""
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        vae=vae,
        text_encoder=model.clip.eval(),
        tokenizer=tokenizer,
        text_encoder_2=model.t5.eval(),
        tokenizer_2=tokenizer_2,
        transformer=model.transformer.eval(),
    )


def sample(
    pipe: FluxPipeline,
    prompts: Sequence[str],
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    seed: int = 0,
) -> torch.Tensor:
    """Return one image a prompt, float32 ``[n, 3, side, side]`` in [-1, 1]; see :func:`~.sampling.draw`."""
    side = pipe.vae.config.sample_size
    options = {"height": side, "width": side, "max_sequence_length": pipe.tokenizer_2.model_max_length}
    return draw(pipe, prompts, seed, num_inference_steps=steps, guidance_scale=guidance, **options)
