"""UNet2DConditionModel: Stable Diffusion 1 and 2 (Rombach et al. 2022) and SDXL (Podell et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dipgo.base.errors import UsageError
from dipgo.model.families.family import Conditions, Family, Prompting, latent_size
from dipgo.model.families.sites import OBSERVED

TOKENS = 77  # of CLIP's text encoders
_SKIPS = 3  # the most layers that clip_skip leaves out in a bundle
_UNSUPPORTED = {  # a config entry that asks for a further input: who has it
    "class_embed_type": "a class or noise-level embedding",
    "num_class_embeds": "a class or noise-level embedding",
    "encoder_hid_dim": "projected text or image embeddings",
    "time_cond_proj_dim": "an embedding of the guidance scale (LCM)",
}


def _is_sdxl(config: Mapping[str, Any]) -> bool:
    """Tell SDXL from Stable Diffusion.

    Raises:
        UsageError: neither: a UNet that takes inputs which no text-to-image pipeline of the two gives it.
    """
    for entry, meaning in _UNSUPPORTED.items():
        if config.get(entry) is not None:
            raise UsageError(f"this UNet takes {meaning} ({entry}), which is not supported; SD-1, SD-2 and SDXL are")
    kind = config.get("addition_embed_type")
    if kind not in (None, "text_time"):
        raise UsageError(f"this UNet takes '{kind}' embeddings, which is not supported; SD-1, SD-2 and SDXL are")
    return kind is not None


def _time_ids(config: Mapping[str, Any], rows: int, vae_scale: int = 8) -> torch.Tensor:
    """Return SDXL's micro-conditions ``[rows, 6]``: original size, crop, target size, as its pipeline's defaults."""
    pixels = [float(vae_scale * side) for side in latent_size(config)]
    return torch.tensor([[*pixels, 0.0, 0.0, *pixels]]).repeat(rows, 1)


def _example(config: Mapping[str, Any], rows: int) -> Conditions:
    given = {"encoder_hidden_states": torch.zeros(rows, TOKENS, config["cross_attention_dim"])}
    if _is_sdxl(config):
        times = _time_ids(config, rows)
        pooled = config["projection_class_embeddings_input_dim"] - times.shape[1] * config["addition_time_embed_dim"]
        given |= {"text_embeds": torch.zeros(rows, pooled), "time_ids": times}
    return given


def _encode(pipe: Any, prompts: Sequence[str]) -> tuple[Conditions, Conditions]:
    config, texts = pipe.unet.config, list(prompts)
    if not _is_sdxl(config):
        conditional, unconditional = pipe.encode_prompt(texts, pipe.device, 1, True)
        return {"encoder_hidden_states": unconditional}, {"encoder_hidden_states": conditional}
    conditional, unconditional, pooled, null_pooled = pipe.encode_prompt(texts, device=pipe.device)
    times = _time_ids(config, len(texts), pipe.vae_scale_factor)
    return (
        {"encoder_hidden_states": unconditional, "text_embeds": null_pooled, "time_ids": times},
        {"encoder_hidden_states": conditional, "text_embeds": pooled, "time_ids": times},
    )


def _call(denoiser: nn.Module, sample: torch.Tensor, timestep: torch.Tensor, given: Conditions) -> torch.Tensor:
    added = {name: value for name, value in given.items() if name != "encoder_hidden_states"}
    return denoiser(
        sample, timestep, given["encoder_hidden_states"], added_cond_kwargs=added or None, return_dict=False
    )[0]


def _encode_sd(
    encoders: Sequence[nn.Module], ids: Sequence[torch.Tensor], masks: Sequence[torch.Tensor | None]
) -> tuple[torch.Tensor, ...]:
    """CLIP's last hidden state, after the final norm; those of layers before it get the same norm."""
    encoder: Any = encoders[0]
    output = encoder(ids[0], attention_mask=masks[0], output_hidden_states=True)
    norm = getattr(encoder, "text_model", encoder).final_layer_norm
    skipped = [norm(output.hidden_states[-1 - skip]) for skip in range(1, 1 + _skips_sd([encoder.config]))]
    return (output[0], *skipped)


def _encode_sdxl(
    encoders: Sequence[nn.Module], ids: Sequence[torch.Tensor], masks: Sequence[torch.Tensor | None]
) -> tuple[torch.Tensor, ...]:
    """The last hidden state but one of each encoder, side by side, and the last encoder's pooled embedding."""
    outputs = [encoder(tokens, output_hidden_states=True) for encoder, tokens in zip(encoders, ids, strict=True)]

    def hidden(skip: int) -> torch.Tensor:
        return torch.cat([output.hidden_states[-2 - skip] for output in outputs], dim=-1)

    skips = _skips_sdxl([encoder.config for encoder in encoders])
    return hidden(0), outputs[-1][0], *(hidden(skip) for skip in range(1, 1 + skips))


def _skips_sd(configs: Sequence[Any]) -> int:
    return min(_SKIPS, *(config.num_hidden_layers for config in configs))


def _skips_sdxl(configs: Sequence[Any]) -> int:
    return min(_SKIPS, *(config.num_hidden_layers - 1 for config in configs))


_SD = Prompting(
    encoders=("text_encoder",),
    tokenizers=("tokenizer",),
    tokens=TOKENS,
    conditions=("encoder_hidden_states",),
    encode=_encode_sd,
    skips=_skips_sd,
    own_length=True,
    masked=lambda config: bool(config.get("use_attention_mask")),
    prefixes=("text_model.",),
)
_SDXL = Prompting(
    encoders=("text_encoder", "text_encoder_2"),
    tokenizers=("tokenizer", "tokenizer_2"),
    tokens=TOKENS,
    conditions=("encoder_hidden_states", "text_embeds"),
    encode=_encode_sdxl,
    skips=_skips_sdxl,
    own_length=True,
    zeros="force_zeros_for_empty_prompt",
    fixed=lambda config, vae_scale: {"time_ids": _time_ids(config, 1, vae_scale)},
    prefixes=("text_model.",),
)

UNET = Family(
    denoiser_class="UNet2DConditionModel",
    pipelines=("StableDiffusionPipeline", "StableDiffusionXLPipeline"),
    component="unet",
    conditioned_by="prompt",
    sites=OBSERVED["UNet2DConditionModel"],
    granularity="block",
    encode=_encode,
    example=_example,
    call=_call,
    uneven=True,
    prompting=lambda config: _SDXL if _is_sdxl(config) else _SD,
    upcasts_vae=_is_sdxl,
)
