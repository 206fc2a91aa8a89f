"""How a pipeline reads prompts, seen at its ``encode_prompt``: what tokenizers are given, and what becomes of it.

From this follows a :class:`~dipgo.model.families.family.Prompting`: the pipeline's own ``encode_prompt`` around token
ids in the place of tokenizers, so that it can be traced. Where that makes as many tokens of a prompt as this has, the
conditions are gathered from the encoders' hidden states (:mod:`~dipgo.model.observed.gather`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from dipgo.base.errors import DipgoWarning, UsageError
from dipgo.model.families.family import Prompting
from dipgo.model.observed.gather import Hidden, find_sources, states_of
from dipgo.model.observed.observation import Observation
from dipgo.model.observed.reading import LONG, ODD, PROBE, Reading, Reads, read
from dipgo.model.observed.replay import Encode, Side, Texts, encoders_of, is_same, traced


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
    if all(is_same(probed.empty.conditions[each], probed.short.other[each]) for each in wanted):
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


def _prompting(pipe: Any, seen: Observation, wanted: Sequence[str], probed: _Probed) -> Prompting:
    """Return how prompts, or negative ones, are read, after reading some that way."""
    name = type(pipe).__name__
    calls = probed.short.calls_on(PROBE)
    if not calls:
        raise UsageError(f"{name} gives encode_prompt no prompt")
    own = [each for call in calls for each in probed.short.readings[call] if each.has_probe]
    long = [each for call in calls for each in probed.long.readings[call]]
    fixed = [each for each in own if any((each.tokenizer, each.ids.shape) == (b.tokenizer, b.ids.shape) for b in long)]
    ways: list[Callable[[], tuple[Texts, Encode, Side]]] = [
        lambda: (*_gathered(pipe, seen, wanted, own, probed), "right")
    ]
    if fixed and {each.tokenizer for each in own} == {each.tokenizer for each in fixed}:
        ways.insert(0, lambda: (*traced(pipe, Texts.of(fixed), wanted, probed.short, calls), None))
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
    encoders = encoders_of(name, pipe, texts)
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


def _cleans(pipe: Any, seen: Observation, texts: Texts) -> bool:
    """Whether a pipeline gives its tokenizers another text than the prompt in its frame."""
    own = ODD.lower().strip() if texts.lower else ODD
    frames = zip(texts.before, texts.after, strict=True)
    expected = {name: f"{start}{own}{end}" for name, (start, end) in zip(texts.tokenizers, frames, strict=True)}
    readings = [each for inside in read(pipe, seen, ODD).readings for each in inside if each.has_probe]
    return any(each.text != expected.get(each.tokenizer, each.text) for each in readings)


def _verify(pipe: Any, wanted: Sequence[str], probed: _Probed, texts: Texts, encode: Encode, side: Side) -> None:
    """Refuse a way of encoding by which conditions are not those that the pipeline made."""
    modules = [getattr(pipe, each) for each in encoders_of(type(pipe).__name__, pipe, texts)]
    for prompt, reads in probed.by_prompt.items():
        made = encode(modules, *_tokens(pipe, texts, prompt, side))
        if not all(is_same(value, reads.conditions[each]) for each, value in zip(wanted, made, strict=True)):
            raise UsageError(f"{type(pipe).__name__} reads prompts in a way of its own")


def _tokens(pipe: Any, texts: Texts, prompt: str, side: Side) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
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


def _gathered(
    pipe: Any, seen: Observation, wanted: Sequence[str], own: Sequence[Reading], probed: _Probed
) -> tuple[Texts, Encode]:
    """Return what tokenizers are given, and how conditions come from hidden states, of prompts padded on the right."""
    name = type(pipe).__name__
    if not own:
        raise UsageError(f"{name} gives its tokenizer no prompt")
    texts = Texts.of(own)
    encoders = encoders_of(name, pipe, texts)
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
