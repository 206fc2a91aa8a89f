"""What users of diffusers condition on, as the graph inputs of all images of a call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dipgo.base.dtypes import Dtype
from dipgo.base.errors import UsageError
from engines.pipeline.formats import is_torch, to_array
from engines.program import Program
from engines.steps import rows_of
from export.axes import sizes_at

EMBEDDINGS = {
    "encoder_hidden_states": ("negative_prompt_embeds", "prompt_embeds"),
    "encoder_attention_mask": ("negative_prompt_attention_mask", "prompt_attention_mask"),
    "text_embeds": ("negative_pooled_prompt_embeds", "pooled_prompt_embeds"),
}
"""The arguments of diffusers pipelines, unconditional and conditional, that a denoiser's conditions are made of."""


def conditions_of(
    program: Program, subjects: Any, repeats: int, batch_size: int, size: tuple[int, int], arguments: Mapping[str, Any]
) -> tuple[int, dict[str, np.ndarray]]:
    """Return how many images a call makes, and the graph inputs of all of them.

    Args:
        program: whose engines are loaded.
        subjects: prompts or classes, one or a list; None where embeddings or nothing condition.
        repeats: images of each.
        batch_size: how many, where nothing conditions.
        size: height and width of the images in pixels.
        arguments: ``negative_prompt`` and embeddings, by the names that diffusers gives them.

    Raises:
        UsageError: something else than what conditions the bundle.
    """
    conditioning, folder = program.record.conditioning, program.bundle.folder
    if repeats < 1 or batch_size < 1:
        raise UsageError(f"{min(repeats, batch_size)} images; ask for at least one")
    _refuse_unread(program, arguments)
    if conditioning.kind == "nothing":
        if subjects is not None:
            raise UsageError(f"{folder}: nothing conditions it; give batch_size alone")
        return batch_size * repeats, {}
    if arguments.get("prompt_embeds") is not None:
        if subjects is not None:
            raise UsageError("both prompt and prompt_embeds are given; give one of them")
        conditions = _from_embeddings(program, arguments, repeats, size)
        return len(next(iter(conditions.values()))) // (1 + conditioning.guided), conditions
    kinds: tuple[type, ...] = (str,) if conditioning.kind == "prompt" else (int, np.integer)
    values = to_array(subjects).tolist() if is_torch(subjects) or isinstance(subjects, np.ndarray) else subjects
    values = [values] if isinstance(values, kinds) else values
    if not isinstance(values, list | tuple) or not values or not all(isinstance(each, kinds) for each in values):
        argument = "prompt" if conditioning.kind == "prompt" else "class_labels"
        raise UsageError(f"{folder}: conditioned by {conditioning.kind}; give {argument}, one or a list")
    conditions = _from_subjects(program, values, arguments.get("negative_prompt"), size)
    images = np.arange(len(values)).repeat(repeats)
    return len(images), rows_of(conditions, images, len(values))


def _refuse_unread(program: Program, arguments: Mapping[str, Any]) -> None:
    """Refuse embeddings and negative prompts that would make no difference."""
    kind, folder = program.record.conditioning.kind, program.bundle.folder
    embeddings = _embeddings(arguments)
    negative = ["negative_prompt"] if arguments.get("negative_prompt") is not None else []
    if kind != "prompt" and embeddings + negative:
        raise UsageError(f"{folder}: conditioned by {kind}; leave {(embeddings + negative)[0]} out")
    if embeddings and "prompt_embeds" not in embeddings:
        raise UsageError(f"{embeddings[0]} is given without prompt_embeds; give all embeddings, or prompts alone")
    if embeddings and negative:
        raise UsageError("both negative_prompt and embeddings are given; give negative_prompt_embeds in its place")


def _embeddings(arguments: Mapping[str, Any]) -> list[str]:
    """Return the names of the embeddings among the arguments."""
    return [name for pair in EMBEDDINGS.values() for name in pair if arguments.get(name) is not None]


def _from_subjects(
    program: Program, values: Sequence[Any], negative: str | Sequence[str] | None, size: tuple[int, int]
) -> dict[str, np.ndarray]:
    """Return the conditions of prompts or classes; ``negative`` is one for all or one each."""
    if negative is None or isinstance(negative, str):
        return program.conditions(values, negative, size)
    if len(negative) != len(values):
        raise UsageError(f"{len(negative)} negative prompts for {len(values)} prompts; give as many, or one")
    single = [program.conditions([value], other, size) for value, other in zip(values, negative, strict=True)]
    stacks = {name: np.stack([one[name] for one in single], axis=1) for name in single[0]}
    return {name: value.reshape(-1, *value.shape[2:]) for name, value in stacks.items()}


def _from_embeddings(
    program: Program, arguments: Mapping[str, Any], repeats: int, size: tuple[int, int]
) -> dict[str, np.ndarray]:
    """Return the conditions from the caller's embeddings (:data:`EMBEDDINGS`), each row ``repeats`` times.

    Raises:
        UsageError: one that is missing or that the bundle does not take, passes that do not agree, a shape that is not
            the bundle's, or a condition that no argument stands for.
    """
    conditioning = program.record.conditioning
    constants: dict[str, Sequence[float]] = {}
    if conditioning.encoder:
        axes = program.axes_of(program.latent_shape(1, size))
        sizes = {name: sizes_at(row, axes) for name, row in conditioning.encoder.sized.items()}
        constants = {**conditioning.encoder.fixed, **sizes}
    conditions: dict[str, np.ndarray] = {}
    names: list[str] = []
    for tensor in conditioning.inputs:
        if tensor.name in constants:
            continue
        if tensor.name not in EMBEDDINGS:
            raise UsageError(f"the bundle takes '{tensor.name}' and holds no text encoder; use Program.denoise")
        passes: list[np.ndarray] = []
        for name in EMBEDDINGS[tensor.name][0 if conditioning.guided else 1 :]:
            names.append(name)
            if arguments.get(name) is None:
                raise UsageError(f"{name} is missing; give it with the other embeddings")
            rows = to_array(arguments[name])
            passes.append(rows.repeat(repeats, axis=0))
            shape = [len(passes[0]) // repeats, *tensor.shape[1:]]
            if list(rows.shape) != shape:
                raise UsageError(f"{name} is {list(rows.shape)}, the bundle was compiled for {shape}")
        conditions[tensor.name] = np.concatenate(passes).astype(Dtype(tensor.dtype).numpy)
    other = next((name for name in _embeddings(arguments) if name not in names), None)
    if other:
        raise UsageError(f"{other} is given, the bundle takes {', '.join(names)}; leave it out")
    counts = sorted({len(value) for value in conditions.values()})
    if len(counts) > 1:
        raise UsageError(f"embeddings are of {' and '.join(map(str, counts))} rows")
    return conditions | {name: np.tile(np.asarray(row, np.float32), (counts[0], 1)) for name, row in constants.items()}
