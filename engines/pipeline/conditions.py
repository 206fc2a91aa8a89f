"""What users of diffusers condition on, as the graph inputs of all images of a call."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dipgo.base.control import PICTURE
from dipgo.base.dtypes import Dtype
from dipgo.base.errors import DipgoWarning, UsageError
from engines.finite import check_input
from engines.guidance import Guidance, fixed_conditions
from engines.pipeline.arguments import MICRO_CONDITIONS
from engines.pipeline.formats import is_torch, to_array
from engines.pipeline.text import Each
from engines.program import Program
from engines.steps import rows_of
from export.axes import sizes_at
from export.records.bundle import BundleRecord

EMBEDDINGS = {
    "encoder_hidden_states": ("negative_prompt_embeds", "prompt_embeds"),
    "encoder_attention_mask": ("negative_prompt_attention_mask", "prompt_attention_mask"),
    "pooled_projections": ("negative_pooled_prompt_embeds", "pooled_prompt_embeds"),
    "text_embeds": ("negative_pooled_prompt_embeds", "pooled_prompt_embeds"),
}
"""The arguments of diffusers pipelines, unconditional and conditional, that a denoiser's conditions are made of."""


_MICRO_ARGUMENTS = ("original_size", "crops_coords_top_left", "target_size")


def conditions_of(
    program: Program,
    subjects: Any,
    images: tuple[int, int],
    size: tuple[int, int],
    arguments: Mapping[str, Any],
    guidance: Guidance,
) -> tuple[int, dict[str, np.ndarray]]:
    """Return how many images a call makes, and the graph inputs of all of them.

    Args:
        program: whose engines are loaded.
        subjects: prompts or classes, one or a list; None where embeddings or nothing condition.
        images: how many of each, and how many where nothing conditions.
        size: height and width of the images in pixels.
        arguments: ``negative_prompt``, embeddings and sizes, by the names that diffusers gives them.

    Raises:
        UsageError: something else than what conditions the bundle.
    """
    conditioning, folder = program.record.conditioning, program.bundle.folder
    repeats, batch_size = images
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
        conditions = _from_embeddings(program, arguments, repeats, size, guidance)
        _set_micro_conditions(conditions, conditioning.guided, size, arguments)
        return len(next(iter(conditions.values()))) // (1 + conditioning.guided), conditions
    kinds: tuple[type, ...] = (str, Each) if conditioning.kind == "prompt" else (int, np.integer)
    values = to_array(subjects).tolist() if is_torch(subjects) or isinstance(subjects, np.ndarray) else subjects
    values = [values] if isinstance(values, kinds) else values
    if not isinstance(values, list | tuple) or not values or not all(isinstance(each, kinds) for each in values):
        argument = "prompt" if conditioning.kind == "prompt" else "class_labels"
        raise UsageError(f"{folder}: conditioned by {conditioning.kind}; give {argument}, one or a list")
    conditions = _from_subjects(program, values, size, arguments, guidance)
    of_images = np.arange(len(values)).repeat(repeats)
    conditions = rows_of(conditions, of_images, len(values))
    _set_micro_conditions(conditions, conditioning.guided, size, arguments)
    return len(of_images), conditions


def for_each(program: Program, first: Any, others: Sequence[Any], name: str) -> Any:
    """Return prompts for all text encoders: those of the first, or some for each where further ones have others.

    ``others`` are those of the second encoder, and of a third; None stands for the first's.

    Raises:
        UsageError: others for an encoder that is not there, or another number of them.
    """
    given = [number for number, each in enumerate(others, 2) if each is not None and each != first]
    if not given:
        return first
    encoder = program.record.conditioning.encoder
    if first is None and name == "prompt":
        raise UsageError(f"prompt_{given[0]} is given without prompt; give both, or prompt alone")
    if first is None and encoder and encoder.unconditional == "zeros":
        return None  # as SDXL's pipeline has it
    if program.encoders < given[-1]:
        which = {2: "second", 3: "third"}[given[-1]]
        raise UsageError(f"{name}_{given[-1]} is given, the bundle has no {which} text encoder; leave it out")
    columns = [first, *(first if each is None else each for each in others)][: program.encoders]
    listed = [[each] if each is None or isinstance(each, str) else list(each) for each in columns]
    for number, column in enumerate(listed[1:], 2):
        if len(column) != len(listed[0]):
            raise UsageError(f"{len(column)} of {name}_{number} for {len(listed[0])} of {name}; give as many")
    rows = [Each(text or "" for text in row) for row in zip(*listed, strict=True)]
    return rows[0] if isinstance(others[given[0] - 2], str) else rows


def _micro_conditions(size: tuple[int, int], arguments: Mapping[str, Any]) -> np.ndarray:
    """Return SDXL's micro-conditions of the unconditional and the conditional pass, ``[2, 6]``, as its pipeline does.

    ``size`` is height and width of the images in pixels, which stand for sizes that are not given.
    """

    def row(prefix: str) -> list[float]:
        original, corner, target = (arguments.get(f"{prefix}{name}") for name in _MICRO_ARGUMENTS)
        return [*(original or size), *(corner or (0, 0)), *(target or size)]

    own = all(arguments.get(f"negative_{name}") is not None for name in ("original_size", "target_size"))
    return np.array([row("negative_" if own else ""), row("")], np.float32)


def _set_micro_conditions(
    conditions: dict[str, np.ndarray], guided: bool, size: tuple[int, int], arguments: Mapping[str, Any]
) -> None:
    """Write the sizes and crops of a call over the bundle's own."""
    if MICRO_CONDITIONS in conditions:
        rows = conditions[MICRO_CONDITIONS]
        # Repeated as diffusers does it: of several images every other row of a pass is the other pass's.
        rows[:] = np.resize(_micro_conditions(size, arguments)[1 - guided :], rows.shape)


def guidance_of(record: BundleRecord, arguments: Mapping[str, Any]) -> Guidance:
    """Return what a call's arguments say of guidance.

    Raises:
        UsageError: no guidance is asked for, by leaving the negative prompt out, and the bundle guides always.
    """
    conditioning = record.conditioning
    scale, rescale = arguments.get(conditioning.scale), arguments.get("guidance_rescale")
    negative = any(arguments.get(name) is not None for name in ("negative_prompt", "negative_prompt_embeds"))
    if conditioning.scale == "guidance_scale" or negative or not conditioning.guided:
        return Guidance(scale, rescale)
    off = conditioning.guidance.off if conditioning.guidance else None
    if off is None:
        raise UsageError(
            "no negative_prompt is given, without which the model's pipeline makes no guidance, and the bundle was "
            "compiled with; give negative_prompt, which may be empty"
        )
    if scale is None or scale > off:
        line = "no negative_prompt, so no guidance, as in the model's pipeline; for guidance give one, even if empty"
        warnings.warn(line, DipgoWarning, stacklevel=3)
    return Guidance(off, rescale)


def without_negative(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return a call's arguments without those of the unconditional pass, which is not made."""
    return {name: value for name, value in arguments.items() if not name.startswith("negative_")}


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
    program: Program, values: Sequence[Any], size: tuple[int, int], arguments: Mapping[str, Any], guidance: Guidance
) -> dict[str, np.ndarray]:
    """Return the conditions of prompts or classes; a negative prompt is one for all or a list, one each."""
    negative, clip_skip = arguments.get("negative_prompt"), arguments.get("clip_skip") or 0
    if negative is None or isinstance(negative, str | Each):
        return program.conditions(values, negative, size, clip_skip, guidance)
    if len(negative) != len(values):
        raise UsageError(f"{len(negative)} negative prompts for {len(values)} prompts; give as many, or one")
    pairs = zip(values, negative, strict=True)
    single = [program.conditions([value], other, size, clip_skip, guidance) for value, other in pairs]
    stacks = {name: np.stack([one[name] for one in single], axis=1) for name in single[0]}
    return {name: value.reshape(-1, *value.shape[2:]) for name, value in stacks.items()}


def _from_embeddings(
    program: Program, arguments: Mapping[str, Any], repeats: int, size: tuple[int, int], guidance: Guidance
) -> dict[str, np.ndarray]:
    """Return the conditions from the caller's embeddings (:data:`EMBEDDINGS`), each row ``repeats`` times.

    Raises:
        UsageError: one that is missing or that the bundle does not take, passes that do not agree, a shape that is not
            the bundle's, or a condition that no argument stands for.
    """
    conditioning = program.record.conditioning
    constants: dict[str, Sequence[float]] = {}
    if conditioning.encoder:
        axes = program.axes_of(program.latent_shape(program.batch, size))
        sizes = {name: sizes_at(row, axes) for name, row in conditioning.encoder.sized.items()}
        constants = {**conditioning.encoder.fixed, **sizes}
    conditions: dict[str, np.ndarray] = {}
    names: list[str] = []
    for tensor in conditioning.inputs:
        if tensor.name in constants or tensor.name in conditioning.fixed or tensor.name == PICTURE:
            continue
        if tensor.name not in EMBEDDINGS:
            raise UsageError(f"the bundle takes '{tensor.name}' and holds no text encoder; use Program.denoise")
        passes: list[np.ndarray] = []
        for name in EMBEDDINGS[tensor.name][0 if conditioning.guided else 1 :]:
            names.append(name)
            if arguments.get(name) is None:
                raise UsageError(f"{name} is missing; give it with the other embeddings")
            rows = check_input(to_array(arguments[name]), name)
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
    conditions |= fixed_conditions(program.record, counts[0], guidance)
    return conditions | {name: np.tile(np.asarray(row, np.float32), (counts[0], 1)) for name, row in constants.items()}
