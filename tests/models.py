"""Models and SubNets made for tests."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLQwenImage,
    BriaPipeline,
    BriaTransformer2DModel,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    ControlNetModel,
    DDIMPipeline,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GlmConfig,
    GlmModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
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
    down = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
    up = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")
    config = {"block_out_channels": (16, 32, 32), "down_block_types": down, "up_block_types": up}
    config |= {"sample_size": 8, "layers_per_block": 1, "norm_num_groups": 8}
    config |= {"cross_attention_dim": 24, "attention_head_dim": 2}
    return _stirred(UNet2DConditionModel(**config | changes))


def vae(scale: int, width: int = 4, **changes: Any) -> AutoencoderKL:
    """Return a VAE of four latent channels whose images are ``scale`` times as large as the latent."""
    levels = scale.bit_length()
    torch.manual_seed(1)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    blocks |= {"block_out_channels": (width,) * levels, "norm_num_groups": width // 2}
    return AutoencoderKL(**{"latent_channels": 4, **blocks, **changes}).eval()


TWO_LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2}


def _clip(width: int, projected: bool = False) -> nn.Module:
    torch.manual_seed(2)
    size = {"hidden_size": width, "intermediate_size": 16, "projection_dim": 16}
    config = CLIPTextConfig(vocab_size=54, bos_token_id=52, eos_token_id=53, **size, **TWO_LAYERS)
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def _clip_tokenizer() -> CLIPTokenizer:
    """Return a tokenizer that knows letters alone."""
    words = [*ascii_lowercase, *(f"{letter}</w>" for letter in ascii_lowercase), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[], model_max_length=77)


def _t5_tokenizer() -> T5Tokenizer:
    words = ["<pad>", "</s>", "<unk>", "\N{LOWER ONE EIGHTH BLOCK}", *ascii_lowercase]
    return T5Tokenizer(vocab=[(word, -float(index > 2)) for index, word in enumerate(words)], extra_ids=0)


def _word_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer that knows few words."""
    words = ["<pad>", "</s>", "<unk>", "a", "red", "fox", "two", "dogs", "in", "the", "snow", "harbour"]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")


def tiny_dit(folder: Path) -> str:
    """Save a DiTPipeline with random weights: latent 4x8x8, images 16x16x3, 4 sites by layer, classes 0 to 2."""
    torch.manual_seed(0)
    size = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "sample_size": 8, "patch_size": 1}
    transformer = DiTTransformer2DModel(in_channels=4, out_channels=4, num_embeds_ada_norm=1000, **size)
    for parameter in transformer.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # adaLN and biases away from their tidy start
    scheduler = DDIMScheduler(clip_sample=False)
    DiTPipeline(transformer.eval(), vae(2, 16, sample_size=16, scaling_factor=0.5), scheduler).save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["id2label"] = {"0": "cat", "1": "dog", "2": "fox"}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return str(folder)


def tiny_sd(folder: Path, prediction: str = "epsilon", pipeline: Any = StableDiffusionPipeline, **changes: Any) -> str:
    """Save a StableDiffusionPipeline, or another: SD-1.5 with PNDM, or SD-2.1 with DDIM where v is predicted."""
    kind = DDIMScheduler if prediction == "v_prediction" else PNDMScheduler
    options = {"clip_sample": False} if kind is DDIMScheduler else {"skip_prk_steps": True}
    scheduler = kind(prediction_type=prediction, steps_offset=1, beta_schedule="scaled_linear", **options)
    text = {"text_encoder": _clip(24), "tokenizer": _clip_tokenizer()}
    nothing = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = pipeline(vae=vae(2), unet=_unet(**changes), scheduler=scheduler, **text, **nothing)
    pipe.save_pretrained(folder)
    return str(folder)


def tiny_lcm(folder: Path) -> str:
    """Save a LatentConsistencyModelPipeline: its sampler draws noise, and guidance is embedded."""
    text = {"text_encoder": _clip(24), "tokenizer": _clip_tokenizer()}
    nothing = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    scheduler = LCMScheduler(steps_offset=1, beta_schedule="scaled_linear")
    unet = _unet(time_cond_proj_dim=8)
    LatentConsistencyModelPipeline(vae(2), unet=unet, scheduler=scheduler, **text, **nothing).save_pretrained(folder)
    return str(folder)


def tiny_sdxl(folder: Path) -> str:
    """Save a StableDiffusionXLPipeline: transformers of differing depth, pooled embeddings and sizes as conditions."""
    down, up = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    depths = {"transformer_layers_per_block": (1, 2), "reverse_transformer_layers_per_block": (1, 1)}
    sizes = {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 16 + 6 * 8}
    blocks = {"block_out_channels": (16, 32), "down_block_types": down, "up_block_types": up}
    unet = _unet(use_linear_projection=True, addition_embed_type="text_time", **blocks, **depths, **sizes)
    text = {"text_encoder": _clip(8), "text_encoder_2": _clip(16, projected=True)}
    text |= {"tokenizer": _clip_tokenizer(), "tokenizer_2": _clip_tokenizer()}
    scheduler = EulerDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1)
    pipe = StableDiffusionXLPipeline(vae=vae(2), unet=unet, scheduler=scheduler, add_watermarker=False, **text)
    pipe.save_pretrained(folder)
    return str(folder)


def tiny_pixart(folder: Path, sample_size: int = 32, pipeline: Any = PixArtAlphaPipeline) -> str:
    """Save a PixArt pipeline of two blocks; Alpha's at a sample size of 128 is conditioned by sizes too."""
    torch.manual_seed(0)
    size = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "cross_attention_dim": 24}
    patches = {"sample_size": sample_size, "patch_size": sample_size // 8}
    transformer = _stirred(PixArtTransformer2DModel(caption_channels=12, **size, **patches))
    torch.manual_seed(2)
    encoder = T5EncoderModel(T5Config(vocab_size=30, d_model=12, d_kv=6, num_heads=2, d_ff=16, num_layers=2)).eval()
    scheduler = DPMSolverMultistepScheduler(beta_schedule="linear", beta_end=0.02)
    text = {"tokenizer": _t5_tokenizer(), "text_encoder": encoder}
    pipeline(vae=vae(8), transformer=transformer, scheduler=scheduler, **text).save_pretrained(folder)
    return str(folder)


def tiny_unconditional(folder: Path, pipeline: Any = DDIMPipeline, scheduler: Any = DDIMScheduler) -> str:
    """Save a pipeline of a UNet2DModel: images of 8x8x3 from a class without an entry, which nothing conditions."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    size = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1}
    unet = UNet2DModel(attention_head_dim=4, norm_num_groups=4, **blocks, **size)
    pipeline(_stirred(unet), scheduler(clip_sample=False)).save_pretrained(folder)
    return str(folder)


def tiny_sana(folder: Path) -> str:
    """Save a SanaPipeline: linear attention, flow prediction, a class without an entry."""
    torch.manual_seed(0)
    size = {"in_channels": 4, "out_channels": 4, "num_layers": 2, "sample_size": 16, "patch_size": 2}
    size |= {"num_attention_heads": 2, "attention_head_dim": 8, "caption_channels": 12}
    cross = {"num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16}
    transformer = SanaTransformer2DModel(**size, **cross)
    torch.manual_seed(2)
    text = {"vocab_size": 30, "hidden_size": 12, "intermediate_size": 16, "num_key_value_heads": 2, "head_dim": 6}
    encoder = Gemma2Model(Gemma2Config(pad_token_id=0, eos_token_id=1, bos_token_id=2, **text, **TWO_LAYERS))
    vae_of = {"block_types": "ResBlock", "block_out_channels": (4,) * 6, "layers_per_block": (1,) * 6}
    both = {f"{way}_{name}": value for way in ("encoder", "decoder") for name, value in vae_of.items()}
    both |= {f"{way}_qkv_multiscales": ((),) * 6 for way in ("encoder", "decoder")}
    blocks = {"downsample_block_type": "conv", "upsample_block_type": "interpolate"}
    blocks |= {"decoder_norm_types": "rms_norm", "decoder_act_fns": "silu"}
    coder = AutoencoderDC(latent_channels=4, attention_head_dim=2, **both, **blocks)
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
    )
    SanaPipeline(_t5_tokenizer(), encoder.eval(), coder.eval(), _stirred(transformer), scheduler).save_pretrained(
        folder
    )
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
        passes = [2] if channels == 2 and trace.rows > 1 else []
        drawn = generator.normal(1 / terms, 0.2, (sampler.calls, terms, *passes, *width))
        weights[name] = drawn.astype(np.float32)
    return make_subnet(trace, sampler.identity(trace.guidance_scale), Schedule(gates, weights), SearchRecord())


def _t5(width: int) -> nn.Module:
    torch.manual_seed(2)
    return T5EncoderModel(T5Config(vocab_size=30, d_model=width, d_kv=6, num_heads=2, d_ff=16, num_layers=2)).eval()


def tiny_flux(folder: Path, guided: bool = True) -> str:
    """Save a FluxPipeline: FLUX.1-dev, whose guidance is embedded, or -schnell; packed latents of 16x16 cells."""
    torch.manual_seed(0)
    size = {"in_channels": 16, "num_layers": 2, "num_single_layers": 2, "patch_size": 1}
    heads = {"num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": (4, 4, 8)}
    text = {"joint_attention_dim": 12, "pooled_projection_dim": 16}
    transformer = _stirred(FluxTransformer2DModel(guidance_embeds=guided, **size, **heads, **text))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=guided)
    encoders = {"text_encoder": _clip(16), "text_encoder_2": _t5(12)}
    tokenizers = {"tokenizer": _clip_tokenizer(), "tokenizer_2": _t5_tokenizer()}
    pipe = FluxPipeline(scheduler, vae(2, 4, shift_factor=0.1), **encoders, **tokenizers, transformer=transformer)
    pipe.save_pretrained(folder)
    return str(folder)


def tiny_sd3(folder: Path, channels: int = 4) -> str:
    """Save a StableDiffusion3Pipeline: three text encoders, guidance by a doubled batch."""
    torch.manual_seed(0)
    size = {"sample_size": 16, "patch_size": 2, "in_channels": channels, "num_layers": 2, "pos_embed_max_size": 24}
    heads = {"num_attention_heads": 2, "attention_head_dim": 8, "caption_projection_dim": 16}
    text = {"joint_attention_dim": 48, "pooled_projection_dim": 32}
    transformer = _stirred(SD3Transformer2DModel(out_channels=channels, qk_norm="rms_norm", **size, **heads, **text))
    encoders = {"text_encoder": _clip(16, True), "text_encoder_2": _clip(16, True), "text_encoder_3": _t5(48)}
    tokenizers = {f"tokenizer{number}": _clip_tokenizer() for number in ("", "_2")} | {"tokenizer_3": _t5_tokenizer()}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    coder = vae(2, shift_factor=0.1, latent_channels=channels)
    pipe = StableDiffusion3Pipeline(transformer, scheduler, coder, **encoders, **tokenizers)
    pipe.save_pretrained(folder)
    return str(folder)


def tiny_cogview4(folder: Path) -> str:
    """Save a CogView4Pipeline: each pass of guidance a call of its own, the conditional first; it knows few words."""
    torch.manual_seed(0)
    size = {"sample_size": 16, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2}
    heads = {"num_attention_heads": 2, "attention_head_dim": 8, "time_embed_dim": 8, "condition_dim": 4}
    transformer = _stirred(CogView4Transformer2DModel(text_embed_dim=12, **size, **heads))
    torch.manual_seed(2)
    text = {"vocab_size": 16, "hidden_size": 12, "intermediate_size": 16, "num_key_value_heads": 2, "head_dim": 6}
    encoder = GlmModel(GlmConfig(pad_token_id=0, eos_token_id=1, **text, **TWO_LAYERS)).eval()
    fast = _word_tokenizer()
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.25, time_shift_type="linear")
    CogView4Pipeline(fast, encoder, vae(2), transformer, scheduler).save_pretrained(folder)
    return str(folder)


def tiny_qwen(folder: Path) -> str:
    """Save a QwenImagePipeline: it guides where a negative prompt is given, by a pass of its own and its norm."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": (8, 4, 4)}
    size = {"in_channels": 16, "out_channels": 4, "num_layers": 2, "joint_attention_dim": 12}
    transformer = _stirred(QwenImageTransformer2DModel(**size, **heads))
    torch.manual_seed(2)
    text = {"vocab_size": 16, "hidden_size": 12, "intermediate_size": 16, "num_key_value_heads": 2, **TWO_LAYERS}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 1]}}
    sight = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "out_hidden_size": 12}
    encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=sight)).eval()
    torch.manual_seed(1)
    scales = {"latents_mean": [0.1] * 4, "latents_std": [1.2] * 4}
    coder = AutoencoderKLQwenImage(
        4, 4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False], **scales
    ).eval()
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    QwenImagePipeline(scheduler, coder, encoder, _word_tokenizer(), transformer).save_pretrained(folder)
    return str(folder)


def tiny_bria(folder: Path) -> str:
    """Save a BriaPipeline: as many tokens of a prompt as it has, then zeros."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "attention_head_dim": 8, "axes_dims_rope": (0, 4, 4)}
    size = {"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 12}
    transformer = _stirred(BriaTransformer2DModel(pooled_projection_dim=None, **size, **heads))
    scheduler = FlowMatchEulerDiscreteScheduler()
    BriaPipeline(transformer, scheduler, vae(2), _t5(12), _t5_tokenizer()).save_pretrained(folder)
    return str(folder)


def tiny_controlled(folder: Path, nets: int = 1, sdxl: bool = False) -> str:
    """Save a StableDiffusionControlNetPipeline, or SDXL's: the tiny one, with ControlNets for 16x16 pictures."""
    small: dict[str, Any] = {
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    }
    small |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
    base = tiny_sdxl(folder / "plain") if sdxl else tiny_sd(folder / "plain", **small)
    plain = (StableDiffusionXLPipeline if sdxl else StableDiffusionPipeline).from_pretrained(base)
    kind = StableDiffusionXLControlNetPipeline if sdxl else StableDiffusionControlNetPipeline
    made = []
    for seed in range(nets):
        torch.manual_seed(seed)
        embedding = (8, 16)  # one step down, as far as the VAE's
        made.append(_stirred(ControlNetModel.from_unet(plain.unet, conditioning_embedding_out_channels=embedding)))
    parts = plain.components | {"controlnet": made[0] if nets == 1 else made}
    parts |= {"add_watermarker": False} if sdxl else {"requires_safety_checker": False}
    kind(**parts).save_pretrained(folder)
    shutil.rmtree(folder / "plain")
    return str(folder)
