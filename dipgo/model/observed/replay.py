"""A pipeline's own ``encode_prompt`` around token ids, in the place of its tokenizers: so that it can be traced."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

import torch
from torch import nn
from torch.utils import _pytree as pytree

from dipgo.base.errors import UsageError
from dipgo.model.observed.reading import PROBE, Reading, Reads, answered, reads_probe, texts_of

Encode = Callable[
    [Sequence[nn.Module], Sequence[torch.Tensor], Sequence[torch.Tensor | None]], tuple[torch.Tensor, ...]
]
Side = Literal["right", "left"] | None


@dataclass(frozen=True)
class Texts:
    """What each tokenizer is given of a prompt, and how many tokens it makes of it."""

    tokenizers: tuple[str, ...]
    before: tuple[str, ...]
    after: tuple[str, ...]
    lengths: tuple[int, ...]
    lower: bool

    @staticmethod
    def of(readings: Sequence[Reading], lengths: Sequence[int] = ()) -> Texts:
        first = {each.tokenizer: each for each in reversed(readings)}
        tokenizers = tuple(dict.fromkeys(each.tokenizer for each in readings))
        lower = PROBE not in readings[0].text
        around = [first[each].text.partition(PROBE.lower() if lower else PROBE) for each in tokenizers]
        own = tuple(int(first[each].ids.shape[-1]) for each in tokenizers)
        return Texts(
            tokenizers,
            tuple(before for before, _, _ in around),
            tuple(after for _, _, after in around),
            tuple(lengths) or own,
            lower,
        )


def encoders_of(name: str, pipe: Any, texts: Texts) -> tuple[str, ...]:
    encoders = tuple(each.replace("tokenizer", "text_encoder") for each in texts.tokenizers)
    if missing := next((each for each in encoders if getattr(pipe, each, None) is None), None):
        raise UsageError(f"{name} has no {missing}")
    return encoders


def traced(pipe: Any, texts: Texts, wanted: Sequence[str], reads: Reads, calls: Sequence[int]) -> tuple[Texts, Encode]:
    """Return the pipeline's ``encode_prompt`` around token ids."""
    leaves = pytree.tree_leaves([reads.results[call] for call in calls])
    places = []
    for each in wanted:
        found = (_Place.of(k, leaf, reads.conditions[each]) for k, leaf in enumerate(leaves))
        place = next((place for place in found if place), None)
        if place is None:
            raise UsageError(f"{type(pipe).__name__} makes '{each}' of more than the prompt's encoding")
        places.append(place)
    arguments, encoders = [reads.arguments[call] for call in calls], encoders_of(type(pipe).__name__, pipe, texts)

    def encode(
        modules: Sequence[nn.Module], ids: Sequence[torch.Tensor], masks: Sequence[torch.Tensor | None]
    ) -> tuple[torch.Tensor, ...]:
        given = dict(zip(texts.tokenizers, zip(ids, masks, strict=True), strict=True))

        def answer(name: str, result: Any, asked: Mapping[str, Any]) -> Any:
            probes = [reads_probe(text) for text in texts_of(asked)]
            if not any(probes):
                return result
            tokens, mask = given[name]
            if result.input_ids.shape[1:] != tokens.shape[1:]:  # another look at the prompt, to say what was cut
                return type(result)({key: value[:, :1] for key, value in result.items()})
            both: dict[str, Any] = {"input_ids": tokens, "attention_mask": mask}
            if all(probes):
                return type(result)(both)
            rows = {key: iter(value) for key, value in both.items()}  # beside others in one call
            return type(result)(
                {
                    key: torch.stack([next(rows[key]) if own else result[key][k] for k, own in enumerate(probes)])
                    for key in both
                }
            )

        def one_each(value: Any) -> Any:
            single = isinstance(value, list) and len(value) == 1 and isinstance(value[0], str)
            return value * len(ids[0]) if single else value

        with ExitStack() as stack:
            stack.enter_context(answered(pipe, answer))
            for attribute, module in zip(encoders, modules, strict=True):
                stack.enter_context(mock.patch.object(pipe, attribute, module))
            try:
                made = pytree.tree_leaves(
                    [pipe.encode_prompt(**{key: one_each(each) for key, each in given.items()}) for given in arguments]
                )
            except KeyError as error:  # of what the tokenizer gave, Kolors' positions say
                raise UsageError(
                    f"{type(pipe).__name__} needs {error} of its tokenizer, beside ids and mask"
                ) from error
        return tuple(place.take(made) for place in places)

    return texts, encode


@dataclass(frozen=True)
class _Place:
    """Where a condition comes from: a result of ``encode_prompt``, then so many entries of one value along axis 1.

    Attributes:
        shape: of a row of the condition.
        axis: of the result, along which prompts lie.
    """

    number: int
    shape: tuple[int, ...]
    axis: int = 0
    more: int = 0
    value: float = 0.0

    @staticmethod
    def of(number: int, leaf: Any, own: torch.Tensor) -> _Place | None:
        """Return the place of a condition ``[1, …]`` where this result makes it up."""
        shape = tuple(own.shape[1:])
        if not isinstance(leaf, torch.Tensor):
            return None
        if leaf.numel() == own.numel() and torch.equal(leaf.to(own.dtype).flatten(), own.flatten()):
            axis = next((axis for axis in (0, 1) if leaf.shape[axis : axis + 1] == (1,)), None)
            return None if axis is None else _Place(number, shape, axis)
        if leaf.ndim != own.ndim or leaf.ndim < 2:
            return None
        head, tail = own[:, : leaf.shape[1]], own[:, leaf.shape[1] :]
        if not tail.numel() or not is_same(leaf, head) or not bool((tail == tail.flatten()[0]).all()):
            return None
        return _Place(number, shape, 0, tail.shape[1], float(tail.flatten()[0]))

    def take(self, results: Sequence[Any]) -> torch.Tensor:
        result: torch.Tensor = results[self.number]
        if not self.more:
            return result.movedim(self.axis, 0).reshape(-1, *self.shape)
        shape = (result.shape[0], self.more, *result.shape[2:])
        return torch.cat([result, torch.full(shape, self.value, dtype=result.dtype)], dim=1)


def is_same(leaf: Any, own: torch.Tensor) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.shape == own.shape and bool(torch.equal(leaf.to(own.dtype), own))
