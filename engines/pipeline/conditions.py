"""What users of diffusers condition on, as the graph inputs of all images of a call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dipgo.base.errors import UsageError
from engines.backend import numpy_type
from engines.pipeline.formats import is_torch, to_array
from engines.program import Program
from engines.steps import rows_of
from export.axes import shape_at

EMBEDDINGS = {
    "encoder_hidden_states": ("negative_prompt_embeds", "prompt_embeds"),
    "encoder_attention_mask": ("negative_prompt_attention_mask", "prompt_attention_mask"),
    "text_embeds": ("negative_pooled_prompt_embeds", "pooled_prompt_embeds"),
}
"""The arguments of diffusers pipelines, unconditional and conditional, that a denoiser's conditions are made of."""


def conditions_of(
    program: Program, given: Any, repeats: int, batch_size: int, size: tuple[int, int], asked: Mapping[str, Any]
) -> tuple[int, dict[str, np.ndarray]]:
    """Return how many images a call makes, and the graph inputs of all of them.

    Args:
        program: whose engines are loaded.
        given: prompts or classes, one or a list; None where embeddings or nothing condition.
        repeats: images of each.
        batch_size: how many, where nothing conditions.
        size: height and width of the images in pixels.
        asked: ``negative_prompt`` and embeddings, by the names that diffusers gives them.

    Raises:
        UsageError: something else than what conditions the bundle.
    """
    conditioning, folder = program.record.conditioning, program.bundle.folder
    if repeats < 1 or batch_size < 1:
        raise UsageError(f"{min(repeats, batch_size)} images; ask for at least one")
    _refuse_unread(program, asked)
    if conditioning.kind == "nothing":
        if given is not None:
            raise UsageError(f"{folder}: nothing conditions it; give batch_size alone")
        return batch_size * repeats, {}
    if asked.get("prompt_embeds") is not None:
        if given is not None:
            raise UsageError("both prompt and prompt_embeds are given; give one of them")
        made = embedded(program, asked, repeats, size)
        return len(next(iter(made.values()))) // (1 + conditioning.guided), made
    kinds: tuple[type, ...] = (str,) if conditioning.kind == "prompt" else (int, np.integer)
    values = to_array(given).tolist() if is_torch(given) or isinstance(given, np.ndarray) else given
    values = [values] if isinstance(values, kinds) else values
    if not isinstance(values, list | tuple) or not values or not all(isinstance(each, kinds) for each in values):
        argument = "prompt" if conditioning.kind == "prompt" else "class_labels"
        raise UsageError(f"{folder}: conditioned by {conditioning.kind}; give {argument}, one or a list")
    made = _encoded(program, values, asked.get("negative_prompt"), size)
    rows = np.arange(len(values)).repeat(repeats)
    return len(rows), rows_of(made, rows, len(values))


def _refuse_unread(program: Program, asked: Mapping[str, Any]) -> None:
    """Refuse embeddings and negative prompts that would make no difference."""
    kind, folder = program.record.conditioning.kind, program.bundle.folder
    embeddings = _embeddings(asked)
    negative = ["negative_prompt"] if asked.get("negative_prompt") is not None else []
    if kind != "prompt" and embeddings + negative:
        raise UsageError(f"{folder}: conditioned by {kind}; leave {(embeddings + negative)[0]} out")
    if embeddings and "prompt_embeds" not in embeddings:
        raise UsageError(f"{embeddings[0]} is given without prompt_embeds; give all embeddings, or prompts alone")
    if embeddings and negative:
        raise UsageError("both negative_prompt and embeddings are given; give negative_prompt_embeds in its place")


def _embeddings(asked: Mapping[str, Any]) -> list[str]:
    """Return the names of the embeddings that are given."""
    return [name for halves in EMBEDDINGS.values() for name in halves if asked.get(name) is not None]


def _encoded(
    program: Program, values: Sequence[Any], negative: str | Sequence[str] | None, size: tuple[int, int]
) -> dict[str, np.ndarray]:
    """Return the conditions of prompts or classes; ``negative`` is one for all or one each."""
    if negative is None or isinstance(negative, str):
        return program.conditions(values, negative, size)
    if len(negative) != len(values):
        raise UsageError(f"{len(negative)} negative prompts for {len(values)} prompts; give as many, or one")
    single = [program.conditions([value], other, size) for value, other in zip(values, negative, strict=True)]
    joined = {name: np.stack([one[name] for one in single], axis=1) for name in single[0]}
    return {name: value.reshape(-1, *value.shape[2:]) for name, value in joined.items()}


def embedded(program: Program, given: Mapping[str, Any], repeats: int, size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Return the conditions from embeddings that the caller made, each row ``repeats`` times.

    Args:
        given: the arguments named in :data:`EMBEDDINGS`.
        size: height and width of the images in pixels.

    Raises:
        UsageError: one that is missing or that the bundle does not take, halves that do not agree, a shape that is not
            the bundle's, or a condition that no argument stands for.
    """
    conditioning = program.record.conditioning
    fixed: dict[str, Sequence[float]] = {}
    if conditioning.encoder:
        axes = program.axes_of(program.latent_shape(1, size))
        sized = {name: shape_at(row, axes) for name, row in conditioning.encoder.sized.items()}
        fixed = {**conditioning.encoder.fixed, **sized}
    found: dict[str, np.ndarray] = {}
    read: list[str] = []
    for tensor in conditioning.inputs:
        if tensor.name in fixed:
            continue
        if tensor.name not in EMBEDDINGS:
            raise UsageError(f"the bundle takes '{tensor.name}' and holds no text encoder; use Program.denoise")
        halves = []
        for argument in EMBEDDINGS[tensor.name][0 if conditioning.guided else 1 :]:
            read.append(argument)
            if given.get(argument) is None:
                raise UsageError(f"{argument} is missing; give it with the other embeddings")
            halves.append(to_array(given[argument]).repeat(repeats, axis=0))
            if halves[-1].shape[1:] != tuple(tensor.shape[1:]) or len(halves[-1]) != len(halves[0]):
                rows = len(halves[0]) // repeats
                raise UsageError(
                    f"{argument} is {list(to_array(given[argument]).shape)}, the bundle was compiled for "
                    f"{[rows, *tensor.shape[1:]]}"
                )
        found[tensor.name] = np.concatenate(halves).astype(numpy_type(tensor.dtype))
    for argument in _embeddings(given):
        if argument not in read:
            raise UsageError(f"{argument} is given, the bundle takes {', '.join(read)}; leave it out")
    rows = len(next(iter(found.values())))
    if any(len(value) != rows for value in found.values()):
        raise UsageError(f"embeddings are of {' and '.join(sorted({str(len(v)) for v in found.values()}))} rows")
    return found | {name: np.tile(np.asarray(row, np.float32), (rows, 1)) for name, row in fixed.items()}
