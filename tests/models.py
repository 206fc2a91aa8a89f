"""Models and SubNets made for tests."""

from __future__ import annotations

import json
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from dipgo.graph.trace import Trace
from dipgo.model.sampler import Sampler
from dipgo.schedule.schedule import Schedule, backup_outputs
from dipgo.schedule.search_record import SearchRecord
from dipgo.schedule.subnet import SubNet, make_subnet


def _stirred(module: nn.Module) -> nn.Module:
    """Move all parameters away from their tidy start."""
    for parameter in module.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return module.eval()


def _unet(**changes: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    config = {
        "sample_size": 8,
        "block_out_channels": (16, 32, 32),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 24,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    }
    return _stirred(UNet2DConditionModel(**config | changes))


def tiny_vae() -> AutoencoderKL:
    """Return a decoder for latents of four channels."""
    torch.manual_seed(1)
    return AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4, sample_size=8)


def vae(scale: int) -> AutoencoderKL:
    """Return a VAE of four latent channels whose images are ``scale`` times as large as the latent."""
    levels = scale.bit_length()
    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(4,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=4,
        norm_num_groups=2,
    ).eval()


def _clip(width: int, projected: bool = False) -> nn.Module:
    torch.manual_seed(2)
    config = CLIPTextConfig(
        vocab_size=54,
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=16,
        bos_token_id=52,
        eos_token_id=53,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def _clip_tokenizer() -> CLIPTokenizer:
    """Return a tokenizer that knows letters alone."""
    words = [*ascii_lowercase, *(f"{letter}</w>" for letter in ascii_lowercase), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[], model_max_length=77)


def _t5_tokenizer() -> T5Tokenizer:
    words = ["<pad>", "</s>", "<unk>", "\N{LOWER ONE EIGHTH BLOCK}", *ascii_lowercase]
    return T5Tokenizer(vocab=[(word, -float(index > 2)) for index, word in enumerate(words)], extra_ids=0)


def tiny_dit(folder: Path) -> str:
    """Save a DiTPipeline with random weights: latent 4x8x8, images 16x16x3, 4 sites by layer, classes 0 to 2."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=8,
        patch_size=1,
        num_embeds_ada_norm=1000,
    )
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(16, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=16,
        scaling_factor=0.5,
    )
    for parameter in transformer.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # adaLN and biases away from their tidy start
    scheduler = DDIMScheduler(clip_sample=False)
    DiTPipeline(transformer.eval(), vae.eval(), scheduler).save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["id2label"] = {"0": "cat", "1": "dog", "2": "fox"}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return str(folder)


def tiny_sd(folder: Path, prediction: str = "epsilon") -> str:
    """Save a StableDiffusionPipeline: SD-1.5 with PNDM, or SD-2.1 with DDIM where v is predicted."""
    kind = DDIMScheduler if prediction == "v_prediction" else PNDMScheduler
    options = {"clip_sample": False} if kind is DDIMScheduler else {"skip_prk_steps": True}
    scheduler = kind(prediction_type=prediction, steps_offset=1, beta_schedule="scaled_linear", **options)
    StableDiffusionPipeline(
        vae=vae(2),
        text_encoder=_clip(24),
        tokenizer=_clip_tokenizer(),
        unet=_unet(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return str(folder)


def tiny_sdxl(folder: Path) -> str:
    """Save a StableDiffusionXLPipeline: transformers of differing depth, pooled embeddings and sizes as conditions."""
    unet = _unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        use_linear_projection=True,
        cross_attention_dim=24,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8,
    )
    StableDiffusionXLPipeline(
        vae=vae(2),
        text_encoder=_clip(8),
        text_encoder_2=_clip(16, projected=True),
        tokenizer=_clip_tokenizer(),
        tokenizer_2=_clip_tokenizer(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1),
        add_watermarker=False,
    ).save_pretrained(folder)
    return str(folder)


def tiny_pixart(folder: Path, sample_size: int = 32, pipeline: Any = PixArtAlphaPipeline) -> str:
    """Save a PixArt pipeline of two blocks; Alpha's at a sample size of 128 is conditioned by sizes too."""
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        cross_attention_dim=24,
        sample_size=sample_size,
        patch_size=sample_size // 8,
        caption_channels=12,
    )
    torch.manual_seed(2)
    encoder = T5EncoderModel(T5Config(vocab_size=30, d_model=12, d_kv=6, num_heads=2, d_ff=16, num_layers=2))
    pipeline(
        tokenizer=_t5_tokenizer(),
        text_encoder=encoder.eval(),
        vae=vae(8),
        transformer=_stirred(transformer),
        scheduler=DPMSolverMultistepScheduler(beta_schedule="linear", beta_end=0.02),
    ).save_pretrained(folder)
    return str(folder)


def tiny_unconditional(folder: Path, pipeline: Any = DDIMPipeline, scheduler: Any = DDIMScheduler) -> str:
    """Save a pipeline of a UNet2DModel: images of 8x8x3 from a class without an entry, which nothing conditions."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=4,
    )
    pipeline(_stirred(unet), scheduler(clip_sample=False)).save_pretrained(folder)
    return str(folder)


def tiny_sana(folder: Path) -> str:
    """Save a SanaPipeline: linear attention, flow prediction, a class without an entry."""
    torch.manual_seed(0)
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=12,
        sample_size=16,
        patch_size=2,
    )
    torch.manual_seed(2)
    encoder = Gemma2Model(
        Gemma2Config(
            vocab_size=30,
            hidden_size=12,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=6,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=2,
        )
    )
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(4,) * 6,
        decoder_block_out_channels=(4,) * 6,
        encoder_layers_per_block=(1,) * 6,
        decoder_layers_per_block=(1,) * 6,
        encoder_qkv_multiscales=((),) * 6,
        decoder_qkv_multiscales=((),) * 6,
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
    )
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
    )
    SanaPipeline(_t5_tokenizer(), encoder.eval(), vae.eval(), _stirred(transformer), scheduler).save_pretrained(folder)
    return str(folder)


def random_subnet(
    trace: Trace, sampler: Sampler, seed: int, keep: float = 0.5, terms: int = 1, channels: int | None = None
) -> SubNet:
    """Draw gates, and with ``channels`` backup weights: scalars (0), per channel (1), per pass of guidance too (2)."""
    generator = np.random.default_rng(seed)
    gates = generator.random((sampler.calls, len(trace.sites))) < keep
    gates[0] = True
    weights: dict[str, np.ndarray] = {}
    for name, site, node in backup_outputs(trace) if channels is not None else ():
        width = [trace.shape(node, 1)[trace.sites[site].channel_axis]] if channels else []
        passes = [2] if channels == 2 and trace.guidance_scale > 1 else []
        drawn = generator.normal(1 / terms, 0.2, (sampler.calls, terms, *passes, *width))
        weights[name] = drawn.astype(np.float32)
    return make_subnet(trace, sampler.identity(trace.guidance_scale), Schedule(gates, weights), SearchRecord())
