"""What a request gives the ControlNets of a bundle: pictures, how strongly they count, and in which steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from dipgo.base.control import PICTURE, STRENGTH, kept
from dipgo.base.dtypes import Dtype
from dipgo.base.errors import UsageError
from engines.pipeline.formats import is_torch, to_array
from engines.program import Program
from export.records.bundle import BundleRecord

ARGUMENTS = {"controlnet_conditioning_scale": 1.0, "control_guidance_start": 0.0, "control_guidance_end": 1.0}
"""The arguments of diffusers' pipelines beside ``image``, and their defaults; one for all ControlNets, or a list."""


def nets_of(record: BundleRecord) -> int:
    """Return how many ControlNets a bundle has."""
    return next((int(each.shape[1]) for each in record.conditioning.inputs if each.name == STRENGTH), 0)


def check_control(record: BundleRecord, name: str, value: Any) -> None:
    """Refuse an argument of ControlNets where there are none, or numbers that are not one for all or one for each.

    Raises:
        UsageError: naming the argument and the cure.
    """
    nets = nets_of(record)
    if not nets:
        raise UsageError(f"{name} is given, the bundle has no ControlNet; leave it out, or export a pipeline with one")
    each = value if isinstance(value, list | tuple) else [value] * nets
    if len(each) != nets or not all(isinstance(number, int | float) and np.isfinite(number) for number in each):
        wanted = "a number" if nets == 1 else f"a number, or a list of {nets}, one for each ControlNet"
        raise UsageError(f"{name} = {value}; give {wanted}")


def strengths(record: BundleRecord, arguments: Mapping[str, Any]) -> np.ndarray:
    """Return by how much what each ControlNet adds is multiplied: ``[steps, ControlNets, 1, 1]`` float32.

    Raises:
        UsageError: a start that is not before its end, or shares of the steps beyond 0 and 1.
    """
    nets, steps = nets_of(record), len(record.steps)
    values = {name: arguments.get(name) for name in ARGUMENTS}
    scale, start, end = (
        np.broadcast_to(np.asarray(usual if values[name] is None else values[name], float), (nets,))
        for name, usual in ARGUMENTS.items()
    )
    for first, last in zip(start, end, strict=True):
        if not 0 <= first < last <= 1:
            raise UsageError(
                f"control_guidance_start = {first:g}, control_guidance_end = {last:g}; give 0 <= start < end <= 1"
            )
    columns = [each * kept(steps, first, last) for each, first, last in zip(scale, start, end, strict=True)]
    return np.stack(columns, axis=1).astype(np.float32)[:, :, None, None]


def size_of(program: Program, arguments: Mapping[str, Any], height: int | None, width: int | None) -> tuple[int, int]:
    """Return height and width of a call's images: as asked for, or as its control picture's, cut to whole cells."""
    own = program.size
    if nets_of(program.record) and arguments.get("image") is not None:
        cell = program.record.cell
        own = tuple(side - side % cell for side in _sides(_first(arguments["image"])))  # type: ignore[assignment]
    return height or own[0], width or own[1]


def control_conditions(
    program: Program, arguments: Mapping[str, Any], prompts: int, repeats: int, size: tuple[int, int]
) -> dict[str, np.ndarray]:
    """Return the graph inputs of the ControlNets for ``repeats`` images of each prompt, both passes; none without any.

    Those that may change from step to step have the steps after the rows.

    Raises:
        UsageError: no picture, another number of them than of prompts or ControlNets, one of another size or mode.
    """
    record = program.record
    nets = nets_of(record)
    given, (height, width) = arguments.get("image"), size
    if not nets:
        if given is not None:
            check_control(record, "image", given)
        return {}
    if given is None:
        raise UsageError(f"{program.bundle.folder}: has a ControlNet; give its picture as image, {height}x{width}")
    tensor = next(each for each in record.conditioning.inputs if each.name == PICTURE)
    channels = int(tensor.shape[1]) // nets
    pictures = [_pixels_of(each, size, channels) for each in _by_net(given, nets)]
    for each in pictures:
        if len(each) not in (1, prompts):
            raise UsageError(f"{len(each)} control pictures for {prompts} prompts; give one, or one for each")
    rows = [np.resize(each, (prompts, *each.shape[1:])).repeat(repeats, axis=0) for each in pictures]
    passes = 1 + record.conditioning.guided
    joined = np.tile(np.concatenate(rows, axis=1), (passes, 1, 1, 1))
    factors = np.broadcast_to(strengths(record, arguments), (len(joined), len(record.steps), nets, 1, 1))
    kind = Dtype(tensor.dtype).numpy
    return {PICTURE: joined.astype(kind), STRENGTH: factors.astype(kind)}


def _by_net(given: Any, nets: int) -> list[Any]:
    """Return the pictures of each ControlNet; of several a list is given, or one of such lists for each prompt."""
    if nets == 1:
        return [given]
    if not isinstance(given, list | tuple) or not given:
        raise UsageError(f"image is {type(given).__name__}; give a list of {nets}, one for each ControlNet")
    if isinstance(given[0], list | tuple):
        given = [list(each) for each in zip(*given, strict=False)]
    if len(given) != nets:
        raise UsageError(f"{len(given)} pictures for {nets} ControlNets; give a list of one for each")
    return list(given)


def _first(given: Any) -> Any:
    while isinstance(given, list | tuple) and given:
        given = given[0]
    return given


def _pixels_of(given: Any, size: tuple[int, int], channels: int) -> np.ndarray:
    """Return pictures as ``[n, channels, height, width]`` float32 in [0, 1], as diffusers makes them of its inputs.

    Those of PIL are resized; arrays ``[height, width, channels]`` or ``[n, …]``, and tensors ``[channels, height,
    width]`` or ``[n, …]``, must have the size.
    """
    listed = list(given) if isinstance(given, list | tuple) else [given]
    if not listed:
        raise UsageError("image is an empty list; give a picture")
    return np.concatenate([_pixels(each, size, channels) for each in listed])


def _pixels(picture: Any, size: tuple[int, int], channels: int) -> np.ndarray:
    height, width = size
    if isinstance(picture, Image.Image):
        resized = picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
        return np.asarray(resized, np.float32).transpose(2, 0, 1)[None] / 255
    if not is_torch(picture) and not isinstance(picture, np.ndarray):
        raise UsageError(f"image is a {type(picture).__name__}; give a picture of PIL, an array or a tensor")
    values = to_array(picture)
    values = values[None] if values.ndim == 3 else values
    if values.ndim == 4 and not is_torch(picture):
        values = values.transpose(0, 3, 1, 2)
    if values.shape[1:] != (channels, *size):
        form = [channels, height, width] if is_torch(picture) else [height, width, channels]
        raise UsageError(f"image is {list(picture.shape)}; give {form}, or several, for images of {height}x{width}")
    if not (values.min() >= 0 and values.max() <= 1):  # not a number is neither
        raise UsageError(f"image has values from {values.min():g} to {values.max():g}; give numbers from 0 to 1")
    return values.astype(np.float32)


def _sides(picture: Any) -> Sequence[int]:
    if isinstance(picture, Image.Image):
        return picture.height, picture.width
    shape = tuple(getattr(picture, "shape", ()))
    if len(shape) < 3:
        raise UsageError(f"image is a {type(picture).__name__}; give a picture of PIL, an array or a tensor")
    return shape[-2:] if is_torch(picture) else shape[-3:-1]
