"""Forms of denoisers of images, around the class's own computation."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch.nn.functional import pad

from dipgo.model.observed.forms.form import Arguments, own_forward, padded


def read_qwen(arguments: Arguments, tokens: int) -> Arguments:
    text, mask = padded(arguments["encoder_hidden_states"], arguments.get("encoder_hidden_states_mask"), tokens)
    shapes = arguments["img_shapes"][:1]  # those of all images are the same
    return arguments | {"encoder_hidden_states": text, "encoder_hidden_states_mask": mask, "img_shapes": shapes}


def read_fibo(arguments: Arguments, tokens: int) -> Arguments:
    text, image = arguments["encoder_hidden_states"], arguments["hidden_states"]
    more, options = (0, 0, 0, tokens - text.shape[1]), arguments["joint_attention_kwargs"]
    whole = text.new_ones(len(text), 1, 1, text.shape[1] + image.shape[1], dtype=torch.bool)
    mask = options.get("attention_mask", whole)[:, 0, 0]
    padded_text, text_mask = padded(text, mask[:, : text.shape[1]], tokens)
    mask = torch.cat([text_mask, mask[:, text.shape[1] :]], dim=1)[:, None, None]
    return arguments | {
        "encoder_hidden_states": padded_text,
        "text_encoder_layers": [pad(layer, more) for layer in arguments["text_encoder_layers"]],
        "txt_ids": pad(arguments["txt_ids"], more),
        "joint_attention_kwargs": options | {"attention_mask": mask},
    }


def chroma(denoiser: Any, **arguments: Any) -> Any:
    """Chroma, whose embedding of time makes a list as long as the batch."""
    embedding = denoiser.time_text_embed

    def embed(timestep: torch.Tensor) -> torch.Tensor:
        time = embedding.time_proj(timestep).to(timestep.dtype)
        guidance = embedding.guidance_proj(torch.zeros_like(timestep)).to(timestep.dtype)
        table = embedding.mod_proj.to(time)
        both = torch.cat([time, guidance], dim=1)[:, None].expand(-1, len(table), -1)
        return torch.cat([both, table[None].expand(time.shape[0], -1, -1)], dim=-1)

    with mock.patch.object(embedding, "forward", embed):
        return own_forward(denoiser, **arguments)


def read_hidream(arguments: Arguments, tokens: int) -> Arguments:
    layers = arguments.get("encoder_hidden_states_llama3")
    if layers is None:
        return arguments
    others = {name: value for name, value in arguments.items() if name != "encoder_hidden_states_llama3"}
    return others | {"llama3_layers": layers.transpose(0, 1)}


def hidream(denoiser: Any, llama3_layers: torch.Tensor, **arguments: Any) -> Any:
    """HiDream, which takes layers of text before rows, sorts tokens by experts, and lays images out one by one."""
    height, width = arguments["hidden_states"].shape[2:]

    def unpatchify(tokens: torch.Tensor, *_: Any) -> torch.Tensor:
        side = denoiser.config.patch_size
        cells = tokens[:, : height // side * (width // side)].unflatten(1, (height // side, width // side))
        cells = cells.unflatten(3, (side, side, -1)).permute(0, 5, 1, 3, 2, 4)
        return cells.flatten(4, 5).flatten(2, 3)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(denoiser, "unpatchify", unpatchify))
        for module in denoiser.modules():
            if hasattr(module, "moe_infer"):
                stack.enter_context(mock.patch.object(module, "moe_infer", partial(_by_all_experts, module)))
        return own_forward(denoiser, encoder_hidden_states_llama3=llama3_layers.transpose(0, 1), **arguments)


def _by_all_experts(module: Any, x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return what the experts of each token make of it; all see all tokens ``[n, width]``."""
    chosen = module.num_activated_experts
    shares = torch.zeros(x.shape[0], len(module.experts), dtype=weights.dtype, device=x.device)
    shares = shares.scatter(1, experts.view(-1, chosen), weights.view(-1, chosen))
    parts = [expert(x) * shares[:, k : k + 1].to(x.dtype) for k, expert in enumerate(module.experts)]
    return torch.stack(parts).sum(0)
