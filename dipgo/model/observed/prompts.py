"""How a pipeline reads prompts, seen at its ``encode_prompt``: what tokenizers are given, and what becomes of it.

From this follows a :class:`~dipgo.model.families.family.Prompting`: the pipeline's own ``encode_prompt``, around token
ids in the place of tokenizers, so that it can be traced.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils import _pytree as pytree

from dipgo.base.errors import UsageError
from dipgo.model.families.family import Prompting
from dipgo.model.observed.observation import Observation, joined_conditions
from dipgo.model.observed.request import Request
from dipgo.model.observed.watch import Watch, watch

_PROBE = "Two Red Foxes"
_LONG = _PROBE + ", " + "and a hen, " * 20


@dataclass(frozen=True)
class Reading:
    """A call of a tokenizer on one prompt: the text that it was given, and the shape of the token ids."""

    tokenizer: str
    text: str
    shape: tuple[int, ...]


@dataclass
class _Reads:
    """What was seen of ``encode_prompt``: its arguments and results, and tokenizers' calls, by call."""

    arguments: list[dict[str, Any]] = field(default_factory=list)
    results: list[Any] = field(default_factory=list)
    readings: list[list[Reading]] = field(default_factory=list)


Answer = Callable[[str, Any, Mapping[str, Any]], Any]
"""``(tokenizer, its result, its arguments) -> the result in its place``."""


class _Tokenizer:
    """A tokenizer whose calls are answered by somebody else; all else is its own, its class too."""

    def __init__(self, name: str, original: Any, answer: Answer) -> None:
        self._name, self._original, self._answer = name, original, answer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = {"text": args[0], **kwargs} if args else kwargs
        return self._answer(self._name, self._original(*args, **kwargs), given)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._original)


@contextmanager
def _tokenizers(pipe: Any, answer: Answer) -> Iterator[None]:
    with ExitStack() as stack:
        for name, component in pipe.components.items():
            if name.startswith("tokenizer") and component is not None:
                stack.enter_context(mock.patch.object(pipe, name, _Tokenizer(name, component, answer)))
        yield


def observe_prompts(pipe: Any, seen: Observation) -> Prompting:
    """Return how a pipeline makes conditions of prompts.

    Raises:
        UsageError: it does so in a way that no one graph does, with the reason.
    """
    name = type(pipe).__name__
    if not hasattr(pipe, "encode_prompt"):
        raise UsageError(f"{name} has no encode_prompt")
    wanted = [each for each in seen.conditions if each not in seen.fixed]
    reads, rows = _read(pipe, seen, _PROBE)
    long, longer = _read(pipe, seen, _LONG)
    _, empty = _read(pipe, seen, "")
    call = next((k for k, given in enumerate(reads.arguments) if _PROBE in str(given.get("prompt"))), None)
    if call is None:
        raise UsageError(f"{name} gives encode_prompt no prompt")
    leaves = pytree.tree_leaves(reads.results[call])
    places = []
    for each in wanted:
        own = rows[each][-1:]
        found = (_Place.of(k, leaf, own) for k, leaf in enumerate(leaves))
        place = next((place for place in found if place), None)
        if place is None:
            raise UsageError(f"{name} makes '{each}' of more than the prompt's encoding")
        places.append(place)
    if seen.guide.passes > 1 and all(not rows[each][:1].any() for each in wanted):
        zeros = True
    elif seen.guide.passes > 1 and any(not _is(empty[each][-1:], rows[each][:1]) for each in wanted):
        raise UsageError(f"{name} encodes negative prompts in another way than prompts")
    else:
        zeros = False
    tokenizers, before, after, lengths, lower = _texts(name, reads.readings[call], long.readings[call])
    encoders = tuple(each.replace("tokenizer", "text_encoder") for each in tokenizers)
    missing = next((each for each in encoders if getattr(pipe, each, None) is None), None)
    if missing:
        raise UsageError(f"{name} has no {missing}")
    arguments = reads.arguments[call]

    def encode(
        modules: Sequence[nn.Module], ids: Sequence[torch.Tensor], masks: Sequence[torch.Tensor | None]
    ) -> tuple[torch.Tensor, ...]:
        given = dict(zip(tokenizers, zip(ids, masks, strict=True), strict=True))

        def answer(name: str, result: Any, asked: Mapping[str, Any]) -> Any:
            if not _reads_probe(asked.get("text")):
                return result
            tokens, mask = given[name]
            if result.input_ids.shape[1:] != tokens.shape[1:]:  # another look at the prompt, to say what was cut
                return type(result)({key: value[:, :1] for key, value in result.items()})
            return type(result)({"input_ids": tokens, "attention_mask": mask})

        with ExitStack() as stack:
            stack.enter_context(_tokenizers(pipe, answer))
            for attribute, module in zip(encoders, modules, strict=True):
                stack.enter_context(mock.patch.object(pipe, attribute, module))
            prompts = [_PROBE] * len(ids[0])
            again = {key: prompts if value == [_PROBE] else value for key, value in arguments.items()}
            made = pytree.tree_leaves(pipe.encode_prompt(**again))
        return tuple(place.take(made) for place in places)

    def tokens_of(prompt: str) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
        text = prompt.lower().strip() if lower else prompt
        made = [
            getattr(pipe, each)(
                f"{start}{text}{end}", padding="max_length", max_length=length, truncation=True, return_tensors="pt"
            )
            for each, start, end, length in zip(tokenizers, before, after, lengths, strict=True)
        ]
        return [each.input_ids for each in made], [each.attention_mask for each in made]

    modules = [getattr(pipe, each) for each in encoders]
    for prompt, expected in ((_PROBE, rows), (_LONG, longer), ("", empty)):
        made = encode(modules, *tokens_of(prompt))
        if not all(_is(value, expected[each][-1:]) for each, value in zip(wanted, made, strict=True)):
            raise UsageError(f"{name} reads prompts in a way of its own")
    return Prompting(
        encoders=encoders,
        tokenizers=tokenizers,
        tokens=max(lengths),
        lengths=lengths,
        before=before,
        after=after,
        conditions=tuple(wanted),
        encode=encode,
        masked=lambda config: True,
        lower=lower,
        always_zeros=zeros,
    )


def _read(pipe: Any, seen: Observation, prompt: str) -> tuple[_Reads, dict[str, torch.Tensor]]:
    """Return what is seen while a prompt is encoded, and the conditions that come of it."""
    reads, encode = _Reads(), pipe.encode_prompt
    current: list[Reading] = []

    def answer(name: str, result: Any, asked: Mapping[str, Any]) -> Any:
        text = asked.get("text")
        text = text[0] if isinstance(text, list) and text else text
        ids = getattr(result, "input_ids", None)
        if isinstance(text, str) and isinstance(ids, torch.Tensor):
            current.append(Reading(name, text, tuple(ids.shape)))
        return result

    def encoded(*args: Any, **kwargs: Any) -> Any:
        current.clear()
        arguments = dict(inspect.signature(encode).bind(*args, **kwargs).arguments)
        result = encode(*args, **kwargs)
        reads.arguments.append(arguments)
        reads.results.append(result)
        reads.readings.append(list(current))
        return result

    request = Request(seen.guidance, seen.size, prompts=(prompt,))
    calls = 1 if seen.guide.batched else seen.guide.passes
    with _tokenizers(pipe, answer), mock.patch.object(pipe, "encode_prompt", encoded):
        log = watch(pipe, request.inputs(pipe, seen.component), Watch(seen.component, calls=calls))
    made = joined_conditions(seen, [seen.template.conditions(each.arguments) for each in log.calls])
    return reads, made


def _texts(
    name: str, short: Sequence[Reading], long: Sequence[Reading]
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...], tuple[int, ...], bool]:
    """Return tokenizers, what stands before and after the prompt, lengths, and whether prompts are lower-cased."""
    own = [each for each in short if _reads_probe(each.text)]
    fixed = [
        each for each in own if any(each.tokenizer == other.tokenizer and each.shape == other.shape for other in long)
    ]
    tokenizers = list(dict.fromkeys(each.tokenizer for each in fixed))
    if not fixed or {each.tokenizer for each in own} != set(tokenizers):
        raise UsageError(f"{name} makes as many tokens of a prompt as it has")
    first = {each.tokenizer: each for each in reversed(fixed)}
    lower = _PROBE not in fixed[0].text
    probe = _PROBE.lower() if lower else _PROBE
    around = [first[each].text.partition(probe) for each in tokenizers]
    return (
        tuple(tokenizers),
        tuple(before for before, _, _ in around),
        tuple(after for _, _, after in around),
        tuple(first[each].shape[-1] for each in tokenizers),
        lower,
    )


def _reads_probe(text: Any) -> bool:
    text = text[0] if isinstance(text, list) and text else text
    return isinstance(text, str) and _PROBE.lower() in text.lower()


@dataclass(frozen=True)
class _Place:
    """Where a condition comes from: a result of ``encode_prompt``, then so many entries of one value along axis 1."""

    number: int
    more: int = 0
    value: float = 0.0

    @staticmethod
    def of(number: int, leaf: Any, own: torch.Tensor) -> _Place | None:
        """Return the place of a condition ``[1, …]`` where this result makes it up."""
        if _is(leaf, own):
            return _Place(number)
        if not isinstance(leaf, torch.Tensor) or leaf.ndim != own.ndim or leaf.ndim < 2:
            return None
        head, tail = own[:, : leaf.shape[1]], own[:, leaf.shape[1] :]
        if not tail.numel() or not _is(leaf, head) or not bool((tail == tail.flatten()[0]).all()):
            return None
        return _Place(number, tail.shape[1], float(tail.flatten()[0]))

    def take(self, results: Sequence[Any]) -> torch.Tensor:
        result: torch.Tensor = results[self.number]
        if not self.more:
            return result
        shape = (result.shape[0], self.more, *result.shape[2:])
        return torch.cat([result, torch.full(shape, self.value, dtype=result.dtype)], dim=1)


def _is(leaf: Any, own: torch.Tensor) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.shape == own.shape and bool(torch.equal(leaf.to(own.dtype), own))
