"""How a pipeline reads prompts, seen at its ``encode_prompt``: what tokenizers are given, and what becomes of it.

From this follows a :class:`~dipgo.model.families.family.Prompting`: the pipeline's own ``encode_prompt`` around token
ids in the place of tokenizers, so that it can be traced. Where that makes as many tokens of a prompt as this has, the
conditions are gathered from the encoders' hidden states (:mod:`~dipgo.model.observed.gather`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Literal
from unittest import mock

import torch
from torch import nn
from torch.utils import _pytree as pytree

from dipgo.base.errors import DipgoWarning, UsageError
from dipgo.model.families.family import Prompting
from dipgo.model.observed.gather import Hidden, find_sources, states_of
from dipgo.model.observed.observation import Observation
from dipgo.model.observed.reading import LONG, ODD, PROBE, Reading, Reads, answered, read, reads_probe, texts_of

Encode = Callable[
    [Sequence[nn.Module], Sequence[torch.Tensor], Sequence[torch.Tensor | None]], tuple[torch.Tensor, ...]
]
Side = Literal["right", "left"] | None


def observe_prompts(pipe: Any, seen: Observation) -> Prompting:
    """Return how a pipeline makes conditions of prompts.

    Raises:
        UsageError: it does so in a way that no one graph does, with the reason.
    """
    name = type(pipe).__name__
    if not hasattr(pipe, "encode_prompt"):
        raise UsageError(f"{name} has no encode_prompt")
    wanted = [each for each in seen.conditions if each not in seen.fixed]
    probed = _Probed.of(pipe, seen, negative=False)
    prompting = _prompting(pipe, seen, wanted, probed)
    if seen.guide.passes == 1:
        return prompting
    if all(not probed.short.other[each].any() for each in wanted):
        return replace(prompting, always_zeros=True)
    if all(_is(probed.empty.conditions[each], probed.short.other[each]) for each in wanted):
        return prompting
    return replace(prompting, negative=_prompting(pipe, seen, wanted, _Probed.of(pipe, seen, negative=True)))


@dataclass(frozen=True)
class _Probed:
    """What is seen of a short prompt, of a long one and of the empty one; or of negative prompts."""

    short: Reads
    long: Reads
    empty: Reads
    negative: bool

    @staticmethod
    def of(pipe: Any, seen: Observation, negative: bool) -> _Probed:
        short, long, empty = (read(pipe, seen, prompt, negative) for prompt in (PROBE, LONG, ""))
        return _Probed(short, long, empty, negative)

    @property
    def by_prompt(self) -> dict[str, Reads]:
        return {PROBE: self.short, LONG: self.long, "": self.empty}


@dataclass(frozen=True)
class _Texts:
    """What each tokenizer is given of a prompt, and how many tokens it makes of it."""

    tokenizers: tuple[str, ...]
    before: tuple[str, ...]
    after: tuple[str, ...]
    lengths: tuple[int, ...]
    lower: bool

    @staticmethod
    def of(readings: Sequence[Reading], lengths: Sequence[int] = ()) -> _Texts:
        first = {each.tokenizer: each for each in reversed(readings)}
        tokenizers = tuple(dict.fromkeys(each.tokenizer for each in readings))
        lower = PROBE not in readings[0].text
        around = [first[each].text.partition(PROBE.lower() if lower else PROBE) for each in tokenizers]
        own = tuple(int(first[each].ids.shape[-1]) for each in tokenizers)
        return _Texts(
            tokenizers,
            tuple(before for before, _, _ in around),
            tuple(after for _, _, after in around),
            tuple(lengths) or own,
            lower,
        )


def _prompting(pipe: Any, seen: Observation, wanted: Sequence[str], probed: _Probed) -> Prompting:
    """Return how prompts, or negative ones, are read, after reading some that way."""
    name = type(pipe).__name__
    calls = probed.short.calls_on(PROBE)
    if not calls:
        raise UsageError(f"{name} gives encode_prompt no prompt")
    own = [each for call in calls for each in probed.short.readings[call] if each.has_probe]
    long = [each for call in calls for each in probed.long.readings[call]]
    fixed = [each for each in own if any((each.tokenizer, each.ids.shape) == (b.tokenizer, b.ids.shape) for b in long)]
    ways: list[Callable[[], tuple[_Texts, Encode, Side]]] = [
        lambda: (*_gathered(pipe, seen, wanted, own, probed), "right")
    ]
    if fixed and {each.tokenizer for each in own} == {each.tokenizer for each in fixed}:
        ways.insert(0, lambda: (*_traced(pipe, _Texts.of(fixed), wanted, probed.short, calls), None))
    refusals = []
    for way in ways:
        try:
            texts, encode, side = way()
            _verify(pipe, wanted, probed, texts, encode, side)
            break
        except UsageError as error:
            refusals.append(error)
    else:
        raise refusals[0]
    encoders = _encoders(name, pipe, texts)
    if not probed.negative and _cleans(pipe, seen, texts):
        warnings.warn(
            f"a bundle reads prompts as they are: {name} cleans them first, of HTML and spaces; give clean ones",
            DipgoWarning,
            stacklevel=2,
        )
    return Prompting(
        encoders=encoders,
        tokenizers=texts.tokenizers,
        tokens=max(texts.lengths),
        lengths=texts.lengths,
        before=texts.before,
        after=texts.after,
        conditions=tuple(wanted),
        encode=encode,
        masked=lambda config: True,
        lower=texts.lower,
        side=side,
    )


def _cleans(pipe: Any, seen: Observation, texts: _Texts) -> bool:
    """Whether a pipeline gives its tokenizers another text than the prompt in its frame."""
    own = ODD.lower().strip() if texts.lower else ODD
    frames = zip(texts.before, texts.after, strict=True)
    expected = {name: f"{start}{own}{end}" for name, (start, end) in zip(texts.tokenizers, frames, strict=True)}
    readings = [each for inside in read(pipe, seen, ODD).readings for each in inside if each.has_probe]
    return any(each.text != expected.get(each.tokenizer, each.text) for each in readings)


def _verify(pipe: Any, wanted: Sequence[str], probed: _Probed, texts: _Texts, encode: Encode, side: Side) -> None:
    """Refuse a way of encoding by which conditions are not those that the pipeline made."""
    modules = [getattr(pipe, each) for each in _encoders(type(pipe).__name__, pipe, texts)]
    for prompt, reads in probed.by_prompt.items():
        made = encode(modules, *_tokens(pipe, texts, prompt, side))
        if not all(_is(value, reads.conditions[each]) for each, value in zip(wanted, made, strict=True)):
            raise UsageError(f"{type(pipe).__name__} reads prompts in a way of its own")


def _encoders(name: str, pipe: Any, texts: _Texts) -> tuple[str, ...]:
    encoders = tuple(each.replace("tokenizer", "text_encoder") for each in texts.tokenizers)
    if missing := next((each for each in encoders if getattr(pipe, each, None) is None), None):
        raise UsageError(f"{name} has no {missing}")
    return encoders


def _tokens(pipe: Any, texts: _Texts, prompt: str, side: Side) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    """Return token ids and masks ``[1, length]`` of a prompt, as a bundle's tokenizers make them."""
    text = prompt.lower().strip() if texts.lower else prompt
    made = []
    for each, start, end, length in zip(texts.tokenizers, texts.before, texts.after, texts.lengths, strict=True):
        tokenizer = getattr(pipe, each)
        options = {"padding_side": side} if side else {}
        made.append(
            tokenizer(
                f"{start}{text}{end}",
                padding="max_length",
                max_length=length,
                truncation=True,
                return_tensors="pt",
                **options,
            )
        )
    return [each.input_ids for each in made], [each.attention_mask for each in made]


def _traced(
    pipe: Any, texts: _Texts, wanted: Sequence[str], reads: Reads, calls: Sequence[int]
) -> tuple[_Texts, Encode]:
    """Return the pipeline's ``encode_prompt`` around token ids."""
    leaves = pytree.tree_leaves([reads.results[call] for call in calls])
    places = []
    for each in wanted:
        found = (_Place.of(k, leaf, reads.conditions[each]) for k, leaf in enumerate(leaves))
        place = next((place for place in found if place), None)
        if place is None:
            raise UsageError(f"{type(pipe).__name__} makes '{each}' of more than the prompt's encoding")
        places.append(place)
    arguments, encoders = [reads.arguments[call] for call in calls], _encoders(type(pipe).__name__, pipe, texts)

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


def _gathered(
    pipe: Any, seen: Observation, wanted: Sequence[str], own: Sequence[Reading], probed: _Probed
) -> tuple[_Texts, Encode]:
    """Return what tokenizers are given, and how conditions come from hidden states, of prompts padded on the right."""
    name = type(pipe).__name__
    if not own:
        raise UsageError(f"{name} gives its tokenizer no prompt")
    texts = _Texts.of(own)
    encoders = _encoders(name, pipe, texts)
    sources = find_sources(pipe, seen, wanted, encoders, probed.by_prompt, probed.negative)
    lengths = []
    for number, encoder in enumerate(encoders):
        hidden = [each for each in sources.values() if isinstance(each, Hidden) and each.blocks[0][0] == number]
        if not hidden:
            raise UsageError(f"{name} makes no condition of its {encoder}'s tokens")
        lengths.append(max(each.drop + each.tokens for each in hidden))
    options = [_options(probed.short, encoder) for encoder in encoders]

    def encode(
        modules: Sequence[nn.Module], ids: Sequence[torch.Tensor], masks: Sequence[torch.Tensor | None]
    ) -> tuple[torch.Tensor, ...]:
        given = [mask if mask is not None else torch.ones_like(own) for own, mask in zip(ids, masks, strict=True)]
        states = [states_of(*each) for each in zip(modules, ids, given, options, strict=True)]
        return tuple(sources[each].take(states, given) for each in wanted)

    return replace(texts, lengths=tuple(lengths)), encode


def _options(reads: Reads, encoder: str) -> dict[str, Any]:
    """Return what a text encoder is given beside tokens and mask.

    Raises:
        UsageError: further tensors, of which nobody knows what they are.
    """
    calls = [each.arguments for inside in reads.encodings for each in inside if each.encoder == encoder]
    own = {name: value for name, value in calls[0].items() if name not in ("input_ids", "attention_mask")}
    if other := next((name for name, value in own.items() if isinstance(value, torch.Tensor)), None):
        raise UsageError(f"'{other}' is given to the {encoder}, beside tokens and their mask")
    return {name: value for name, value in own.items() if name not in ("output_hidden_states", "return_dict")}


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
        if not tail.numel() or not _is(leaf, head) or not bool((tail == tail.flatten()[0]).all()):
            return None
        return _Place(number, shape, 0, tail.shape[1], float(tail.flatten()[0]))

    def take(self, results: Sequence[Any]) -> torch.Tensor:
        result: torch.Tensor = results[self.number]
        if not self.more:
            return result.movedim(self.axis, 0).reshape(-1, *self.shape)
        shape = (result.shape[0], self.more, *result.shape[2:])
        return torch.cat([result, torch.full(shape, self.value, dtype=result.dtype)], dim=1)


def _is(leaf: Any, own: torch.Tensor) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.shape == own.shape and bool(torch.equal(leaf.to(own.dtype), own))
