"""Forms of Lumina 2 and Z-Image, whose own rows have text and image close together; here padding lies between."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
from torch.nn.functional import pad

from dipgo.model.observed.forms.form import Arguments, padded


def lumina(
    denoiser: Any,
    hidden_states: torch.Tensor,
    timestep: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    encoder_attention_mask: torch.Tensor,
    **_: Any,
) -> tuple[torch.Tensor]:
    """Lumina 2, which lays image tokens close behind each row's text; here padding lies between, and is masked."""
    time, text = denoiser.time_caption_embed(hidden_states, timestep, encoder_hidden_states)
    rope, side = denoiser.rope_embedder, denoiser.config.patch_size
    height, width, tokens = hidden_states.shape[2] // side, hidden_states.shape[3] // side, text.shape[1]
    places = torch.arange(tokens, device=text.device).clamp(max=rope.axes_lens[0] - 1)
    starts = encoder_attention_mask.sum(1)
    ids = torch.cat([_ids(places.expand(text.shape[0], -1), 1, 1), _ids(starts[:, None], height, width)], dim=1)
    rotary = rope._get_freqs_cis(ids)
    image = hidden_states.unflatten(2, (height, side)).unflatten(4, (width, side))
    image = denoiser.x_embedder(image.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2))
    for layer in denoiser.context_refiner:
        text = layer(text, encoder_attention_mask, rotary[:, :tokens])
    for layer in denoiser.noise_refiner:
        image = layer(image, None, rotary[:, tokens:], time)
    mask = pad(encoder_attention_mask.bool(), (0, height * width), value=True)
    joint = torch.cat([text, image], dim=1)
    for layer in denoiser.layers:
        joint = layer(joint, mask, rotary, time)
    output = denoiser.norm_out(joint, time)[:, tokens:]
    output = output.unflatten(2, (side, side, denoiser.out_channels)).unflatten(1, (height, width))
    return (output.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3),)


_LANE = 32  # tokens, of which Z-Image's sequences are made up


def read_z_image(arguments: Arguments, tokens: int) -> Arguments:
    if isinstance(arguments["x"], torch.Tensor):
        return arguments
    rows = [padded(text[None], None, tokens) for text in arguments["cap_feats"]]
    text, mask = (torch.cat(each) for each in zip(*rows, strict=True))
    latents = torch.stack(arguments["x"]).squeeze(2)
    return arguments | {"x": latents, "cap_feats": text, "cap_mask": mask}


def z_image(denoiser: Any, **arguments: Any) -> tuple[torch.Tensor]:
    with mock.patch.object(torch.amp, "autocast", return_value=nullcontext()):  # it would hide a graph in the graph
        return _z_image_tensors(denoiser, **arguments)


def _z_image_tensors(
    denoiser: Any, x: torch.Tensor, t: torch.Tensor, cap_feats: torch.Tensor, cap_mask: torch.Tensor, **_: Any
) -> tuple[torch.Tensor]:
    """Z-Image, which takes a list of images and one of texts; here text beyond a whole number of lanes is masked."""
    rows, channels, high, wide = x.shape
    side, tokens = 2, cap_feats.shape[1]
    height, width = high // side, wide // side
    time = denoiser.t_embedder(t * denoiser.t_scale).type_as(x)
    lengths = cap_mask.sum(1)
    whole = (lengths + _LANE - 1) // _LANE * _LANE
    places = torch.arange(tokens, device=x.device)
    text_ids = _ids((places + 1).expand(rows, -1), 1, 1)
    extra = -(height * width) % _LANE
    image_ids = pad(_ids(whole[:, None] + 1, height, width), (0, 0, 0, extra))
    rotary = [_z_rotary(denoiser.rope_embedder, ids) for ids in (image_ids, text_ids)]
    image = x.unflatten(2, (height, side)).unflatten(4, (width, side))
    image = denoiser.all_x_embedder["2-1"](image.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2))
    image = torch.cat([image, denoiser.x_pad_token.expand(rows, extra, -1)], dim=1)
    for layer in denoiser.noise_refiner:
        image = layer(image, None, rotary[0], time)
    text = torch.where(cap_mask[..., None], denoiser.cap_embedder(cap_feats), denoiser.cap_pad_token)
    mask = places < whole[:, None]
    for layer in denoiser.context_refiner:
        text = layer(text, mask, rotary[1])
    joint, mask = torch.cat([image, text], dim=1), pad(mask, (image.shape[1], 0), value=True)
    both = torch.cat(rotary, dim=1)
    for layer in denoiser.layers:
        joint = layer(joint, mask, both, time)
    output = denoiser.all_final_layer["2-1"](joint, c=time)[:, : height * width]
    output = output.unflatten(2, (side, side, channels)).unflatten(1, (height, width))
    return (output.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3),)


def _z_rotary(rope: Any, ids: torch.Tensor) -> torch.Tensor:
    tables = rope.precompute_freqs_cis(rope.axes_dims, rope.axes_lens, theta=rope.theta)
    return torch.cat(
        [table.to(ids.device)[ids[..., axis].clamp(max=len(table) - 1)] for axis, table in enumerate(tables)], dim=-1
    )


def _ids(starts: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return the positions of tokens, ``[rows, n · height · width, 3]``: a grid at each of ``starts`` ``[rows, n]``."""
    down = torch.arange(height, device=starts.device)[:, None].expand(height, width)
    along = torch.arange(width, device=starts.device)[None].expand(height, width)
    grid = starts[:, :, None, None].expand(-1, -1, height, width)
    return torch.stack([grid, down.expand_as(grid), along.expand_as(grid)], dim=-1).flatten(1, 3)
