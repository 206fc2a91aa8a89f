"""Other forms of denoisers' calls: where a class's own serves one prompt's length alone, or cannot be traced.

A form reads the arguments that a pipeline passes into those that it takes itself, with a row for each image and text
of one length; its ``forward`` computes on them what the class does on its own. So one graph serves every prompt.
(No ``len`` of a tensor in a forward: torch.export takes it for a constant.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.nn.functional import pad, scaled_dot_product_attention

from dipgo.base.errors import UsageError

Arguments = dict[str, Any]


def _own_forward(denoiser: nn.Module, **arguments: Any) -> Any:
    return type(denoiser).forward(denoiser, **arguments)


def _as_they_are(arguments: Arguments, tokens: int) -> Arguments:
    return arguments


@dataclass(frozen=True)
class Form:
    """How a class of denoiser is called.

    Attributes:
        read: ``(arguments as a pipeline passes them, tokens of every text) -> arguments of forward``; what is read
            already stays as it is.
        forward: ``(denoiser, **arguments) -> outputs``.
        listed: whether pipelines get the first output as a list of images, ``[1, C, 1, H, W]`` without its batch.
    """

    read: Callable[[Arguments, int], Arguments] = _as_they_are
    forward: Callable[..., Any] = _own_forward
    listed: bool = False

    def first(self, output: Any) -> torch.Tensor:
        """Return the first output of a call that a pipeline made."""
        return torch.stack(output[0]).squeeze(2) if self.listed else output[0]

    def handed_out(self, output: Any) -> Any:
        """Return the outputs of :attr:`forward` as a pipeline gets them."""
        return (list(output[0].unsqueeze(2).unbind()),)


def bound(denoiser: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Arguments:
    """Return the arguments of a call by name; those of a form may be others than the class's own."""
    parameters = signature(type(denoiser).forward)
    others = {name: value for name, value in kwargs.items() if name not in parameters.parameters}
    own = {name: value for name, value in kwargs.items() if name not in others}
    arguments = dict(parameters.bind_partial(denoiser, *args, **own).arguments)
    del arguments["self"]
    return arguments | others


def form_of(denoiser: nn.Module) -> Form:
    """Return the form of a denoiser; most classes' own will do."""
    return FORMS.get(type(denoiser).__name__, _OWN)


def padded(text: torch.Tensor, mask: torch.Tensor | None, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return text ``[rows, n, width]`` padded with zeros to ``[rows, tokens, width]``, and a mask ``[rows, tokens]``.

    Raises:
        UsageError: text that is longer.
    """
    more = tokens - text.shape[1]
    if more < 0:
        raise UsageError(f"a prompt of {text.shape[1]} tokens; at most {tokens} are supported")
    mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device) if mask is None else mask.bool()
    return pad(text, (0, 0, 0, more)), pad(mask, (0, more))


def _read_qwen(arguments: Arguments, tokens: int) -> Arguments:
    text, mask = padded(arguments["encoder_hidden_states"], arguments.get("encoder_hidden_states_mask"), tokens)
    shapes = arguments["img_shapes"][:1]  # those of all images are the same
    return arguments | {"encoder_hidden_states": text, "encoder_hidden_states_mask": mask, "img_shapes": shapes}


def _read_fibo(arguments: Arguments, tokens: int) -> Arguments:
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


def _chroma(denoiser: Any, **arguments: Any) -> Any:
    """Chroma, whose embedding of time makes a list as long as the batch."""
    embedding = denoiser.time_text_embed

    def embed(timestep: torch.Tensor) -> torch.Tensor:
        time = embedding.time_proj(timestep).to(timestep.dtype)
        guidance = embedding.guidance_proj(torch.zeros_like(timestep)).to(timestep.dtype)
        table = embedding.mod_proj.to(time)
        both = torch.cat([time, guidance], dim=1)[:, None].expand(-1, len(table), -1)
        return torch.cat([both, table[None].expand(time.shape[0], -1, -1)], dim=-1)

    with mock.patch.object(embedding, "forward", embed):
        return _own_forward(denoiser, **arguments)


def _lumina(
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


def _ids(starts: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return the positions of tokens, ``[rows, n · height · width, 3]``: a grid at each of ``starts`` ``[rows, n]``."""
    down = torch.arange(height, device=starts.device)[:, None].expand(height, width)
    along = torch.arange(width, device=starts.device)[None].expand(height, width)
    grid = starts[:, :, None, None].expand(-1, -1, height, width)
    return torch.stack([grid, down.expand_as(grid), along.expand_as(grid)], dim=-1).flatten(1, 3)


def _read_motion(arguments: Arguments, tokens: int) -> Arguments:
    text, latents = arguments["encoder_hidden_states"], arguments["sample"]
    return arguments | {"encoder_hidden_states": text[:: len(text) // len(latents)]}


def _motion(denoiser: Any, encoder_hidden_states: torch.Tensor, **arguments: Any) -> Any:
    """AnimateDiff's UNet, which takes the text once for each frame."""
    text = encoder_hidden_states.repeat_interleave(arguments["sample"].shape[2], dim=0)
    return _own_forward(denoiser, encoder_hidden_states=text, **arguments)


_LATTE_TOKENS = 120  # of every prompt, before its pipeline cuts it


def _read_latte(arguments: Arguments, tokens: int) -> Arguments:
    text, mask = padded(arguments["encoder_hidden_states"], arguments.get("text_mask"), _LATTE_TOKENS)
    return arguments | {"encoder_hidden_states": text, "text_mask": mask}


def _latte(denoiser: Any, text_mask: torch.Tensor, **arguments: Any) -> Any:
    """Latte, whose blocks take a mask of the text that its pipeline cuts; a row for each frame."""
    frames = arguments["hidden_states"].shape[2]
    bias = (1 - text_mask.to(arguments["encoder_hidden_states"].dtype))[:, None] * -10_000.0
    bias = bias[:, None].expand(-1, frames, -1, -1).flatten(0, 1)
    return _own_forward(denoiser, **arguments | {"encoder_attention_mask": bias})


def _read_hidream(arguments: Arguments, tokens: int) -> Arguments:
    layers = arguments.get("encoder_hidden_states_llama3")
    if layers is None:
        return arguments
    others = {name: value for name, value in arguments.items() if name != "encoder_hidden_states_llama3"}
    return others | {"llama3_layers": layers.transpose(0, 1)}


def _hidream(denoiser: Any, llama3_layers: torch.Tensor, **arguments: Any) -> Any:
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
        return _own_forward(denoiser, encoder_hidden_states_llama3=llama3_layers.transpose(0, 1), **arguments)


def _by_all_experts(module: Any, x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return what the experts of each token make of it; all see all tokens ``[n, width]``."""
    chosen = module.num_activated_experts
    shares = torch.zeros(x.shape[0], len(module.experts), dtype=weights.dtype, device=x.device)
    shares = shares.scatter(1, experts.view(-1, chosen), weights.view(-1, chosen))
    parts = [expert(x) * shares[:, k : k + 1].to(x.dtype) for k, expert in enumerate(module.experts)]
    return torch.stack(parts).sum(0)


def _mochi(denoiser: Any, **arguments: Any) -> Any:
    """Mochi, whose attention takes the tokens of each row's text out, row by row."""
    from diffusers.models.attention_processor import MochiAttnProcessor2_0

    with mock.patch.object(MochiAttnProcessor2_0, "__call__", _attend_with_mask):
        return _own_forward(denoiser, **arguments)


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


_LANE = 32  # tokens, of which Z-Image's sequences are made up


def _read_z_image(arguments: Arguments, tokens: int) -> Arguments:
    if isinstance(arguments["x"], torch.Tensor):
        return arguments
    rows = [padded(text[None], None, tokens) for text in arguments["cap_feats"]]
    text, mask = (torch.cat(each) for each in zip(*rows, strict=True))
    latents = torch.stack(arguments["x"]).squeeze(2)
    return arguments | {"x": latents, "cap_feats": text, "cap_mask": mask}


def _z_image(denoiser: Any, **arguments: Any) -> tuple[torch.Tensor]:
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


_OWN = Form()
FORMS: Mapping[str, Form] = {
    "BriaFiboTransformer2DModel": Form(read=_read_fibo),
    "ChromaTransformer2DModel": Form(forward=_chroma),
    "HiDreamImageTransformer2DModel": Form(_read_hidream, _hidream),
    "LatteTransformer3DModel": Form(_read_latte, _latte),
    "Lumina2Transformer2DModel": Form(forward=_lumina),
    "MochiTransformer3DModel": Form(forward=_mochi),
    "QwenImageTransformer2DModel": Form(read=_read_qwen),
    "UNetMotionModel": Form(_read_motion, _motion),
    "ZImageTransformer2DModel": Form(_read_z_image, _z_image, listed=True),
}
