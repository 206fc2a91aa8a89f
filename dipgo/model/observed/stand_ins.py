"""Stand-ins for networks, which take no time and no memory: around them a pipeline's loop is the same.

A stand-in's output depends on every input, row by row, and is always the same for the same ones: so what a pipeline
does with inputs and outputs can be told from what it makes of them.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from types import MethodType, SimpleNamespace
from typing import Any
from unittest import mock
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils import _pytree as pytree

from dipgo.model.fakes import quiet
from dipgo.model.observed.attention import processors_of
from dipgo.model.observed.forms import bound, form_of

_OUTPUTS: WeakKeyDictionary[nn.Module, dict[str, Any]] = WeakKeyDictionary()
"""What denoisers return, without values, by the shapes of their inputs: finding out takes seconds."""


_PHASE: ContextVar[float] = ContextVar("phase", default=0.0)


@contextmanager
def other_texts() -> Iterator[None]:
    """Within the context text encoders make something else of the same tokens: what changes comes from them."""
    token = _PHASE.set(1.0)
    try:
        yield
    finally:
        _PHASE.reset(token)


@contextmanager
def denoiser_stand_in(denoiser: nn.Module, tokens: int) -> Iterator[None]:
    """Within the context the denoiser's ``forward`` is a stand-in; its weights are not read.

    It takes the arguments of a pipeline as well as those of its form, whose texts have ``tokens`` tokens
    (:mod:`~dipgo.model.observed.forms`).
    """
    forward = _denoise(denoiser, tokens)
    denoiser.forward = forward
    try:
        yield
    finally:
        del denoiser.forward


class _States(tuple[torch.Tensor, ...]):
    """Hidden states; pipelines take them by numbers that suit true encoders, of which a small one's last stands."""

    __slots__ = ()

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, int):
            place = max(min(place, len(self) - 1), -len(self))
        return super().__getitem__(place)


def text_stand_in(encoder: nn.Module) -> None:
    """Replace a text encoder's ``forward`` for good: hidden states of the right shapes that depend on the tokens."""
    config: Any = encoder.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    width = getattr(config, "hidden_size", None) or config.d_model
    layers = int(getattr(config, "num_hidden_layers", 0) or getattr(config, "num_layers", 1))

    def forward(self: Any, input_ids: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        assert input_ids is not None
        phase = _PHASE.get() + torch.arange(width, device=input_ids.device) * 0.11
        hidden = torch.sin(input_ids[..., None].float() * 0.37 + phase)
        if getattr(config, "model_type", None) == "chatglm":  # Kolors' encoder has the tokens along its first axis
            hidden = hidden.transpose(0, 1)
        states = _States((hidden,) * (layers + 1))
        return text_output(encoder, hidden, states, lambda shape: _mixed(hidden.mean(1), shape[1:], "pooled"))

    encoder.forward = MethodType(forward, encoder)


def picture_stand_in(module: nn.Module) -> None:
    """Replace a VAE's ``encode``, or a picture encoder's ``forward``, for good: outputs that depend on the picture."""
    way = "encode" if hasattr(module, "encode") else "forward"
    original = getattr(module, way)

    def encoded(self: Any, pixels: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        pixels = kwargs.pop("pixel_values", pixels)
        assert pixels is not None
        rows = [("picture", pixels)]
        if way == "forward":
            like = output_like(original, (pixels, *args), kwargs)
            return pytree.tree_map_only(torch.Tensor, lambda each: _of(each, rows), like)
        like = output_like(lambda x: _latent_of(original(x)), (pixels,), {})
        return _Encoded(_of(like, rows))

    setattr(module, way, MethodType(encoded, module))


def _latent_of(output: Any) -> torch.Tensor:
    own = output[0] if not hasattr(output, "latent_dist") else output.latent_dist.mode()
    assert isinstance(own, torch.Tensor)
    return own


class _Encoded(SimpleNamespace):
    """What a VAE makes of a picture, however it is asked for."""

    def __init__(self, latent: torch.Tensor) -> None:
        own = SimpleNamespace(sample=lambda *_, **__: latent, mode=lambda: latent, mean=latent)
        super().__init__(latent_dist=own, latents=latent)
        self._latent = own

    def __getitem__(self, place: int) -> Any:
        return self._latent


def text_output(
    encoder: nn.Module,
    last: torch.Tensor,
    states: tuple[torch.Tensor, ...],
    pooled: Callable[[tuple[int, ...]], torch.Tensor],
) -> Any:
    """Return what a text encoder of transformers returns, of its last hidden state and all of them."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling
    from transformers.models.clip.modeling_clip import CLIPTextModelOutput

    if "WithProjection" in type(encoder).__name__:
        config: Any = encoder.config
        embeds = pooled((len(last), config.projection_dim))
        return CLIPTextModelOutput(text_embeds=embeds, last_hidden_state=last, hidden_states=states)
    embeds = pooled((len(last), last.shape[-1]))
    return BaseModelOutputWithPooling(last_hidden_state=last, pooler_output=embeds, hidden_states=states)


def _denoise(denoiser: nn.Module, tokens: int) -> Callable[..., Any]:
    form, own = form_of(denoiser), processors_of(denoiser)
    shapes = _OUTPUTS.setdefault(denoiser, {})

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = bound(denoiser, args, kwargs)
        arguments = form.read(given, tokens)
        key = pytree.tree_map_only(torch.Tensor, lambda value: (tuple(value.shape), value.dtype), arguments)
        if str(key) not in shapes:
            try:
                shapes[str(key)] = output_like(functools.partial(form.forward, denoiser), (), arguments)
            except (DataDependentOutputException, DynamicOutputShapeException):  # it goes by values: guess
                shapes[str(key)] = (_guessed(denoiser, arguments),)
        inputs = [
            (pytree.keystr(path), value)
            for path, value in pytree.tree_flatten_with_path(arguments)[0]
            if isinstance(value, torch.Tensor)
        ]
        if processors_of(denoiser) != own:  # by which rows with the same inputs may differ
            rows = inputs[0][1].shape[0]
            inputs.append(("attention", torch.arange(rows)[:, None] // max(rows // 3, 1)))
        output = pytree.tree_map_only(torch.Tensor, lambda like: _of(like, inputs), shapes[str(key)])
        return form.handed_out(output) if form.listed and arguments is not given else output

    return forward


def _guessed(denoiser: nn.Module, arguments: Mapping[str, Any]) -> torch.Tensor:
    """Return a tensor like the first argument, with the channels that the denoiser gives."""
    first = next(value for value in arguments.values() if isinstance(value, torch.Tensor))
    config: Any = denoiser.config
    taken, given = (getattr(config, name, None) for name in ("in_channels", "out_channels"))
    given = given if first.ndim > 3 and first.shape[1] == taken and isinstance(given, int) else first.shape[1]
    return first[:, :1].expand(-1, given, *[-1] * (first.ndim - 2))


def output_like(forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Return what a call would return, with tensors of the right shapes and dtypes that hold nothing."""
    exporting = mock.patch.object(torch.compiler, "_is_exporting_flag", True)  # else modules cache what is fake
    with torch.no_grad(), quiet(), exporting, FakeTensorMode(allow_non_fake_inputs=True) as mode:
        args, kwargs = pytree.tree_map_only(torch.Tensor, mode.from_tensor, (args, kwargs))
        output = forward(*args, **kwargs)
    return pytree.tree_map_only(
        torch.Tensor, lambda value: torch.empty(value.shape, dtype=value.dtype, device="meta"), output
    )


def _of(like: torch.Tensor, inputs: list[tuple[str, torch.Tensor]]) -> torch.Tensor:
    """Return an output of the shape of ``like``: half the first input, and a pattern for each input by its values."""
    first = inputs[0][1]
    shape = tuple(like.shape)
    total = 0.5 * _resized(first.float(), shape)
    for name, value in inputs:
        total = total + _mixed(value, shape[1:], name, len(total))
    return total.to(like.dtype)


def _mixed(value: torch.Tensor, shape: tuple[int, ...], name: str, rows: int | None = None) -> torch.Tensor:
    """Return ``[rows, *shape]``: a fixed pattern times a number for each row of ``value``, or one number for all."""
    flat = value.detach().float()
    rows = len(flat) if rows is None else rows
    flat = flat.reshape(rows, -1) if value.ndim and len(value) == rows else flat.reshape(1, -1)
    flat = flat / (1 + flat.abs())  # timesteps reach a thousand
    weights = _pattern(f"{name}.weights", (flat.shape[1],)).to(flat.device)
    numbers = flat @ weights / flat.shape[1] ** 0.5
    return numbers.expand(rows).view(-1, *[1] * len(shape)) * _pattern(name, shape).to(flat.device)


def _resized(value: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Return the first numbers of each row in another shape, repeated where they do not suffice."""
    rows, size = value.reshape(len(value), -1), int(torch.Size(shape[1:]).numel())
    return rows.repeat(1, -(-size // rows.shape[1]))[:, :size].reshape(len(value), *shape[1:])


@lru_cache(maxsize=64)
def _pattern(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator)
