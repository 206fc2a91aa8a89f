"""PixArt-α and PixArt-Σ (Chen et al. 2024): a transformer with cross-attention to T5 embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dipgo.model.families.family import Conditions, Family, Prompting

_SIZES = ("resolution", "aspect_ratio")


@dataclass(frozen=True)
class _PixArt:
    """One of the two pipelines: Alpha's (which gives its 1024 model the image's size too) and Sigma's.

    Attributes:
        pipeline: its class.
        tokens: its own ``max_sequence_length``.
        sized: whether it passes micro-conditions: the image's height and width, and their ratio.
    """

    pipeline: str
    tokens: int
    sized: bool

    def family(self) -> Family:
        prompting = Prompting(
            encoders=("text_encoder",),
            tokenizers=("tokenizer",),
            tokens=self.tokens,
            conditions=("encoder_hidden_states", "encoder_attention_mask"),
            encode=_encode_tokens,
            masked=lambda config: True,
            lower=True,
            fixed=lambda config, vae_scale: self._sizes(config, 1, vae_scale),
        )
        return Family(
            denoiser_class="PixArtTransformer2DModel",
            pipelines=(self.pipeline,),
            component="transformer",
            conditioned_by="prompt",
            sites={
                "block": ("transformer_blocks.*",),
                "branch": ("transformer_blocks.*",),
                "layer": (
                    "transformer_blocks.*.attn1",
                    "transformer_blocks.*.attn2",
                    "transformer_blocks.*.ff",
                    "proj_out",
                ),
            },
            granularity="layer",
            encode=self._encode,
            example=self._example,
            call=_call,
            prompting=lambda config: prompting,
        )

    def _sizes(self, config: Mapping[str, Any], rows: int, vae_scale: int = 8) -> Conditions:
        if not self.sized or config["sample_size"] != 128:
            return {}
        pixels = float(vae_scale * config["sample_size"])
        return {"resolution": torch.full((rows, 2), pixels), "aspect_ratio": torch.ones(rows, 1)}

    def _example(self, config: Mapping[str, Any], rows: int) -> Conditions:
        width = config["caption_channels"] or config["cross_attention_dim"]
        return {
            "encoder_hidden_states": torch.zeros(rows, self.tokens, width),
            "encoder_attention_mask": torch.ones(rows, self.tokens),
            **self._sizes(config, rows),
        }

    def _encode(self, pipe: Any, prompts: Sequence[str]) -> tuple[Conditions, Conditions]:
        embeddings, mask, null_embeddings, null_mask = pipe.encode_prompt(
            list(prompts), True, device=pipe.device, clean_caption=False, max_sequence_length=self.tokens
        )  # cleaning captions (HTML, addresses, …) takes packages that pipelines do without where they are not there
        sizes = self._sizes(pipe.transformer.config, len(prompts), pipe.vae_scale_factor)
        return (
            {"encoder_hidden_states": null_embeddings, "encoder_attention_mask": null_mask.float(), **sizes},
            {"encoder_hidden_states": embeddings, "encoder_attention_mask": mask.float(), **sizes},
        )


def _call(denoiser: nn.Module, sample: torch.Tensor, timestep: torch.Tensor, given: Conditions) -> torch.Tensor:
    return denoiser(
        sample,
        encoder_hidden_states=given["encoder_hidden_states"],
        timestep=timestep,
        added_cond_kwargs={name: given.get(name) for name in _SIZES},
        encoder_attention_mask=given["encoder_attention_mask"],
        return_dict=False,
    )[0]


def _encode_tokens(
    encoders: Sequence[nn.Module], ids: Sequence[torch.Tensor], masks: Sequence[torch.Tensor | None]
) -> tuple[torch.Tensor, ...]:
    """T5's last hidden state and the mask of its padding, which the denoiser does not look at either."""
    (encoder,), (tokens,), (mask,) = encoders, ids, masks
    assert mask is not None
    hidden = encoder(tokens, attention_mask=mask)[0]
    return hidden, mask.to(hidden.dtype)


PIXART_ALPHA = _PixArt("PixArtAlphaPipeline", 120, True).family()
PIXART_SIGMA = _PixArt("PixArtSigmaPipeline", 300, False).family()
