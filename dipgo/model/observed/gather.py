"""Conditions as hidden states of text encoders, told by where their numbers come from.

A pipeline that makes as many tokens of a prompt as this has cannot be traced as it is: one graph is for one length.
But what it does with hidden states is to choose layers, to leave the first tokens out, and to pad. So text encoders
give it numbers that say of which encoder, layer, token and column they are, and what arrives at the denoiser tells the
rest. The graph then reads every prompt padded on the right, and hidden states beyond the prompt are zeros.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import nn

from dipgo.base.errors import UsageError
from dipgo.model.observed.observation import Observation
from dipgo.model.observed.reading import Reads, encoders_of, read
from dipgo.model.observed.stand_ins import text_output

_MOST_BLOCKS = 256
_QUESTIONS = ("encoder", "layer", "token", "column")


@dataclass(frozen=True)
class Hidden:
    """A condition ``[B, tokens, *rest]`` of hidden states: blocks of ``(encoder, layer, column, columns)``.

    Attributes:
        drop: how many of the first tokens are left out.
        layer: -1 in a block is the encoder's result, after its last norm.
    """

    drop: int
    tokens: int
    rest: tuple[int, ...]
    blocks: tuple[tuple[int, int, int, int], ...]

    def take(self, states: Sequence[Sequence[torch.Tensor]], masks: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the condition of hidden states, by encoder and layer, and attention masks ``[B, n]``."""
        end = self.drop + self.tokens
        parts = [states[e][layer][:, self.drop : end, start : start + n] for e, layer, start, n in self.blocks]
        value = torch.cat(parts, dim=-1)
        real = masks[self.blocks[0][0]][:, self.drop : end, None] > 0
        return torch.where(real, value, torch.zeros_like(value)).reshape(len(value), self.tokens, *self.rest)


@dataclass(frozen=True)
class Mask:
    """A condition that says which tokens are the prompt's, along its last axis, and then something that is constant."""

    encoder: int
    drop: int
    tokens: int
    tail: torch.Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype

    def take(self, states: Sequence[Sequence[torch.Tensor]], masks: Sequence[torch.Tensor]) -> torch.Tensor:
        mask = masks[self.encoder][:, self.drop : self.drop + self.tokens].to(self.dtype)
        tail = self.tail.to(mask)[None].expand(mask.shape[0], -1)
        return torch.cat([mask, tail], dim=1).reshape(-1, *self.shape)


Source = Hidden | Mask


def find_sources(
    pipe: Any,
    seen: Observation,
    wanted: Sequence[str],
    encoders: Sequence[str],
    prompts: Mapping[str, Reads],
    negative: bool,
) -> dict[str, Source]:
    """Return where conditions come from, the same for all ``prompts``.

    Raises:
        UsageError: one of them comes from elsewhere, or differs in more than the tokens that there are.
    """
    found: dict[str, Source] = {}
    for prompt, reads in prompts.items():
        lengths = [lengths_of(reads, encoder) for encoder in encoders]
        answers = {question: _asked(pipe, seen, prompt, encoders, question, negative) for question in _QUESTIONS}
        for name in wanted:
            values = {question: answers[question][name][0] for question in _QUESTIONS}
            source = _hidden(values, lengths) or _mask(reads.conditions[name], lengths, found)
            known = found.get(name)
            if isinstance(known, Hidden) and not values["encoder"].any():
                source = known if lengths[known.blocks[0][0]] <= known.drop else None  # no token is left
            if source is None or not _same(found.setdefault(name, source), source):
                raise UsageError(f"{type(pipe).__name__} makes '{name}' of more than its text encoders' tokens")
    return found


def lengths_of(reads: Reads, encoder: str) -> int:
    """Return how many tokens an encoder was given of a prompt; those that were masked do not count."""
    calls = [each.arguments for inside in reads.encodings for each in inside if each.encoder == encoder]
    if not calls:
        return 0
    mask = calls[0].get("attention_mask")
    return int(mask[0].sum()) if isinstance(mask, torch.Tensor) else int(calls[0]["input_ids"].shape[-1])


def _hidden(values: Mapping[str, torch.Tensor], lengths: Sequence[int]) -> Hidden | None:
    """Return a condition's blocks from what its numbers ``[tokens, *rest]`` answer; each answer is one more."""
    encoder, layer, token, column = (values[question].to(torch.int64) for question in _QUESTIONS)
    if encoder.ndim < 2 or not encoder.any():
        return None
    rows = [each.flatten(1) for each in (encoder, layer, token, column)]
    number, drop = int(rows[0][0, 0]) - 1, int(rows[2][0, 0]) - 1
    real = lengths[number] - drop if 0 <= number < len(lengths) else -1
    if not 0 < real <= len(encoder) or drop < 0:
        return None
    places = torch.arange(real)[:, None] + drop + 1
    if not bool((rows[2][:real] == places).all()) or any(bool(each[real:].any()) for each in rows):
        return None
    first = [each[0] for each in (rows[0], rows[1], rows[3])]
    if any(not bool((each[:real] == one).all()) for each, one in zip((rows[0], rows[1], rows[3]), first, strict=True)):
        return None
    blocks: list[tuple[int, int, int, int]] = []
    for e, k, c in zip(*(each.tolist() for each in first), strict=True):
        last = blocks[-1] if blocks else None
        if last and last[:2] == (e - 1, k - 2) and last[2] + last[3] == c - 1:
            blocks[-1] = (*last[:3], last[3] + 1)
        else:
            blocks.append((e - 1, k - 2, c - 1, 1))
    if len(blocks) > _MOST_BLOCKS or {e for e, *_ in blocks} != {number}:
        return None
    return Hidden(drop, len(encoder), tuple(encoder.shape[1:]), tuple(blocks))


def _mask(value: torch.Tensor, lengths: Sequence[int], found: Mapping[str, Source]) -> Mask | None:
    """Return a mask for the tokens of a condition that is known already."""
    flat = value[0].flatten()
    if value[0].numel() != value.shape[-1]:
        return None
    for source in found.values():
        if not isinstance(source, Hidden) or len(flat) < source.tokens:
            continue
        encoder = source.blocks[0][0]
        expected = torch.arange(source.tokens) < lengths[encoder] - source.drop
        if torch.equal(flat[: source.tokens].bool(), expected) and bool((flat.float() * (1 - flat.float()) == 0).all()):
            tail = flat[source.tokens :].clone()
            return Mask(encoder, source.drop, source.tokens, tail, tuple(value.shape[1:]), value.dtype)
    return None


def _same(one: Source, other: Source) -> bool:
    if isinstance(one, Mask) and isinstance(other, Mask):
        return (one.drop, one.tokens, one.shape) == (other.drop, other.tokens, other.shape) and torch.equal(
            one.tail, other.tail
        )
    return type(one) is type(other) and one == other


def _asked(
    pipe: Any, seen: Observation, prompt: str, encoders: Sequence[str], question: str, negative: bool
) -> dict[str, torch.Tensor]:
    """Return the conditions of a prompt where hidden states answer a question; everything is counted from one."""
    parts = encoders_of(pipe)
    with ExitStack() as stack:
        for number, name in enumerate(encoders):
            stack.enter_context(_answering(parts[name], number, question))
        return read(pipe, seen, prompt, negative).conditions


@contextmanager
def _answering(encoder: nn.Module, number: int, question: str) -> Iterator[None]:
    width, layers = size_of(encoder)

    def forward(input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        shape = (*input_ids.shape, width)

        def states(layer: int) -> torch.Tensor:
            answers: dict[str, Callable[[], torch.Tensor]] = {
                "encoder": lambda: torch.full(shape, float(number + 1)),
                "layer": lambda: torch.full(shape, float(layer + 2)),
                "token": lambda: (torch.arange(shape[1]) + 1.0)[None, :, None].expand(shape),
                "column": lambda: (torch.arange(width) + 1.0).expand(shape),
            }
            return answers[question]()

        every = tuple(states(layer) for layer in range(layers + 1))
        return text_output(encoder, states(-1), every, torch.zeros)

    with mock.patch.object(encoder, "forward", forward):
        yield


def size_of(encoder: nn.Module) -> tuple[int, int]:
    """Return a text encoder's width and how many layers it has."""
    config: Any = encoder.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    width = getattr(config, "hidden_size", None) or config.d_model
    return int(width), int(getattr(config, "num_hidden_layers", 0) or getattr(config, "num_layers", 1))


def states_of(
    encoder: nn.Module, ids: torch.Tensor, mask: torch.Tensor, options: Mapping[str, Any]
) -> list[torch.Tensor]:
    """Return a text encoder's hidden states ``[B, n, width]`` of token ids and their mask; the last is its result."""
    accepted = inspect.signature(type(encoder).forward).parameters
    asked = {"use_cache": False, **options}
    known = {name: value for name, value in asked.items() if name in accepted}
    output = encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True, **known)
    result = getattr(output, "last_hidden_state", None)
    states = list(output.hidden_states)
    return [*states, states[-1] if result is None else result]
