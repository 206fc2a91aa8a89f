"""Forms of denoisers of video."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from dipgo.model.observed.forms.form import Arguments, own_forward, padded


def read_motion(arguments: Arguments, tokens: int) -> Arguments:
    text, latents = arguments["encoder_hidden_states"], arguments["sample"]
    return arguments | {"encoder_hidden_states": text[:: len(text) // len(latents)]}


def motion(denoiser: Any, encoder_hidden_states: torch.Tensor, **arguments: Any) -> Any:
    """AnimateDiff's UNet, which takes the text once for each frame."""
    text = encoder_hidden_states.repeat_interleave(arguments["sample"].shape[2], dim=0)
    return own_forward(denoiser, encoder_hidden_states=text, **arguments)


_LATTE_TOKENS = 120  # of every prompt, before its pipeline cuts it


def read_latte(arguments: Arguments, tokens: int) -> Arguments:
    text, mask = padded(arguments["encoder_hidden_states"], arguments.get("text_mask"), _LATTE_TOKENS)
    return arguments | {"encoder_hidden_states": text, "text_mask": mask}


def latte(denoiser: Any, text_mask: torch.Tensor, **arguments: Any) -> Any:
    """Latte, whose blocks take a mask of the text that its pipeline cuts; a row for each frame."""
    frames = arguments["hidden_states"].shape[2]
    bias = (1 - text_mask.to(arguments["encoder_hidden_states"].dtype))[:, None] * -10_000.0
    bias = bias[:, None].expand(-1, frames, -1, -1).flatten(0, 1)
    return own_forward(denoiser, **arguments | {"encoder_attention_mask": bias})


def mochi(denoiser: Any, **arguments: Any) -> Any:
    """Mochi, whose attention takes the tokens of each row's text out, row by row."""
    from diffusers.models.attention_processor import MochiAttnProcessor2_0

    with mock.patch.object(MochiAttnProcessor2_0, "__call__", _attend_with_mask):
        return own_forward(denoiser, **arguments)


def _attend_with_mask(
    processor: Any,
    attn: Any,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    attention_mask: torch.Tensor,
    image_rotary_emb: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    image = [part(hidden_states).unflatten(2, (attn.heads, -1)) for part in (attn.to_q, attn.to_k, attn.to_v)]
    text = [
        part(encoder_hidden_states).unflatten(2, (attn.heads, -1))
        for part in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
    ]
    norms = ((image, attn.norm_q, attn.norm_k), (text, attn.norm_added_q, attn.norm_added_k))
    for parts, *own in norms:
        parts[:2] = [part if norm is None else norm(part) for part, norm in zip(parts, own, strict=False)]
    if image_rotary_emb is not None:
        image[:2] = [_turned(part, *image_rotary_emb) for part in image[:2]]
    query, key, value = (torch.cat(pair, dim=1).transpose(1, 2) for pair in zip(image, text, strict=True))
    mask = pad(attention_mask.bool(), (hidden_states.shape[1], 0), value=True)[:, None, None]
    joint = scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2, 3)
    image_out, text_out = joint.split_with_sizes([hidden_states.shape[1], encoder_hidden_states.shape[1]], dim=1)
    image_out = attn.to_out[1](attn.to_out[0](image_out))
    return image_out, attn.to_add_out(text_out) if hasattr(attn, "to_add_out") else text_out


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)
