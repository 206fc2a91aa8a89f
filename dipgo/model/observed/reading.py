"""What a pipeline's tokenizers and text encoders are given of a prompt, seen while it is encoded."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import nn

from dipgo.model.observed.observation import Observation, joined_conditions
from dipgo.model.observed.request import Request
from dipgo.model.observed.watch import Watch, watch

PROBE = "Two Red Foxes"
LONG = PROBE + ", and a hen" * 20
ODD = PROBE + "  &amp; a <b>hen</b>"  # which some pipelines clean
OTHER = "x"  # stands beside a negative prompt


@dataclass(frozen=True)
class Reading:
    """A call of a tokenizer on one prompt: the text that it was given, and the token ids ``[1, n]`` that it made."""

    tokenizer: str
    text: str
    ids: torch.Tensor

    @property
    def has_probe(self) -> bool:
        return reads_probe(self.text)


@dataclass(frozen=True)
class Encoding:
    """A call of a text encoder: its component, and its arguments by name."""

    encoder: str
    arguments: Mapping[str, Any]


@dataclass
class Reads:
    """What was seen of a prompt's encoding.

    Attributes:
        arguments, results: of ``encode_prompt``, by call; ``readings`` and ``encodings`` those inside each.
        conditions: of the pass that the prompt is for, one row each.
        other: of the other pass.
    """

    arguments: list[dict[str, Any]] = field(default_factory=list)
    results: list[Any] = field(default_factory=list)
    readings: list[list[Reading]] = field(default_factory=list)
    encodings: list[list[Encoding]] = field(default_factory=list)
    conditions: dict[str, torch.Tensor] = field(default_factory=dict)
    other: dict[str, torch.Tensor] = field(default_factory=dict)

    def calls_on(self, prompt: str) -> list[int]:
        """Return which calls of ``encode_prompt`` were given a prompt: some pipelines make one for each encoder."""
        words = [[str(value) for value in given.values()] for given in self.arguments]
        return [k for k, given in enumerate(words) if any(prompt in word for word in given)]


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
def answered(pipe: Any, answer: Answer) -> Iterator[None]:
    """Within the context the calls of a pipeline's tokenizers are answered by ``answer``."""
    with ExitStack() as stack:
        for name, component in pipe.components.items():
            if name.startswith("tokenizer") and component is not None:
                stack.enter_context(mock.patch.object(pipe, name, _Tokenizer(name, component, answer)))
        yield


def encoders_of(pipe: Any) -> dict[str, nn.Module]:
    """Return the components of a pipeline that read token ids."""
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    return {
        name: part for name, part in parts.items() if "input_ids" in inspect.signature(type(part).forward).parameters
    }


def read(pipe: Any, seen: Observation, prompt: str, negative: bool = False) -> Reads:
    """Return what is seen while a prompt, or a ``negative`` one beside another, is encoded."""
    reads, encode = Reads(), pipe.encode_prompt
    readings: list[Reading] = []
    encodings: list[Encoding] = []

    def answer(name: str, result: Any, asked: Mapping[str, Any]) -> Any:
        texts, ids = texts_of(asked), getattr(result, "input_ids", None)
        if isinstance(ids, torch.Tensor) and len(ids) == len(texts):
            readings.extend(Reading(name, text, ids[k : k + 1]) for k, text in enumerate(texts))
        return result

    def encoded(*args: Any, **kwargs: Any) -> Any:
        readings.clear()
        encodings.clear()
        arguments = dict(inspect.signature(encode).bind(*args, **kwargs).arguments)
        result = encode(*args, **kwargs)
        reads.arguments.append(arguments)
        reads.results.append(result)
        reads.readings.append(list(readings))
        reads.encodings.append(list(encodings))
        return result

    def noted(name: str, encoder: nn.Module) -> Any:
        forward = encoder.forward

        def called(input_ids: Any = None, *args: Any, **kwargs: Any) -> Any:
            encodings.append(Encoding(name, {"input_ids": input_ids, **kwargs}))
            return forward(input_ids, *args, **kwargs)

        return mock.patch.object(encoder, "forward", called)

    prompts = (OTHER if negative else prompt,)
    request = Request(seen.guidance, seen.asked, prompts=prompts, pictures=seen.pictures)
    inputs = request.inputs(pipe, seen.component)
    if negative:
        inputs["negative_prompt"] = [prompt]
    calls = 1 if seen.guide.batched else seen.guide.passes
    with ExitStack() as stack:
        stack.enter_context(answered(pipe, answer))
        stack.enter_context(mock.patch.object(pipe, "encode_prompt", encoded))
        for name, encoder in encoders_of(pipe).items():
            stack.enter_context(noted(name, encoder))
        log = watch(pipe, inputs, Watch(seen.component, calls=calls))
    rows = joined_conditions(seen, [seen.template.conditions(each.arguments) for each in log.calls])
    first, last = ({name: value[k] for name, value in rows.items()} for k in (slice(0, 1), slice(-1, None)))
    reads.conditions, reads.other = (first, last) if negative else (last, first)
    return reads


def texts_of(asked: Mapping[str, Any]) -> list[str]:
    """Return the texts that a tokenizer is given."""
    text = asked.get("text")
    return [each for each in (text if isinstance(text, list) else [text]) if isinstance(each, str)]


def reads_probe(text: str) -> bool:
    """Whether a text holds the probe."""
    return PROBE.lower() in text.lower()
