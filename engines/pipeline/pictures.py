"""Pictures and masks as users of diffusers pass them, and where trajectories begin that start from one. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from dipgo.base.errors import UsageError
from engines.later import Kept, Origin, factors_of_noise
from engines.pipeline.formats import is_torch, to_array
from engines.program import Program
from engines.sizes import batches_of
from export.records.bundle import BundleRecord
from export.records.program import StartRecord

Draw = Callable[[Sequence[int]], np.ndarray]


def check_pictures(program: Program, image: Any, mask: Any, strength: Any, latents: Any) -> None:
    """Refuse a call that makes no sense: parts of it missing, or a bundle that takes no pictures.

    Raises:
        UsageError: naming the argument and the cure.
    """
    if image is None:
        name = "mask_image" if mask is not None else "strength"
        if mask is not None or strength is not None:
            raise UsageError(f"{name} is given without image; give both, or neither")
        return
    start_record(program, "image")
    for name, each in (("image", image), ("mask_image", mask)):
        if isinstance(each, list | tuple) and not each:
            raise UsageError(f"{name} is an empty list; give a picture")
    if program.record.encoder is None:
        raise UsageError(f"{program.bundle.folder}: holds no VAE encoder; export it with --image, without --denoiser")
    if latents is not None:
        raise UsageError("both image and latents are given; a picture gets its noise from generator")
    start_of(program, strength_of(program, mask, strength))


def start_record(program: Program, what: str) -> StartRecord:
    """Return how trajectories begin later.

    Raises:
        UsageError: ``what`` asks for it, and the bundle was exported without.
    """
    if program.record.start is None:
        raise UsageError(f"{what}: the bundle {program.bundle.folder} starts from noise alone; export it with --image")
    return program.record.start


def strength_of(program: Program, mask: Any, strength: Any) -> Any:
    """Return a request's strength; None is what the diffusers pipeline has by default."""
    usual = start_record(program, "strength").strengths
    return usual[mask is not None] if strength is None else strength


def start_of(program: Program, strength: Any) -> int:
    """Return the first call of the denoiser at a strength, as ``get_timesteps`` of diffusers' pipelines has it.

    Raises:
        UsageError: no number in (0, 1], or one that leaves no step.
    """
    record, steps = start_record(program, "strength"), program.steps
    if isinstance(strength, bool) or not isinstance(strength, float | int) or not 0 < strength <= 1:
        raise UsageError(f"strength = {strength}; give a number above 0, up to 1")
    down = record.rounds == "down"
    begin = steps - int(steps * strength) if down else int(steps - steps * strength)
    if begin >= steps:
        raise UsageError(f"strength = {strength} leaves none of {steps} steps; give at least {1 / steps:.2g}")
    return begin * record.order


def size_for(program: Program, image: Any, mask: Any, height: int | None, width: int | None) -> tuple[int, int]:
    """Return height and width of a call's images: as asked for, or as diffusers' pipeline has them.

    That of Stable Diffusion and SDXL has a picture's own size, without a mask, cut to whole cells.
    """
    own = program.size
    if image is not None and mask is None and program.record.start and program.record.start.rounds == "down":
        first = image[0] if isinstance(image, list | tuple) else image
        cell = program.record.cell
        own = tuple(side - side % cell for side in _sides(first))  # type: ignore[assignment]
    return height or own[0], width or own[1]


def origin_of(
    program: Program,
    draw: Draw,
    images: np.ndarray,
    masks: np.ndarray | None,
    count: int,
    strength: float,
    each_draws: bool,
) -> Origin:
    """Return where the trajectories of ``count`` images begin; draws in the order of diffusers' pipelines.

    Args:
        program: whose engines are loaded.
        draw: draws noise of a shape.
        images: ``[n, channels, height, width]`` in [-1, 1], of which every image gets one in turn.
        masks: ``[m, 1, height, width]`` of 0 and 1, or None.
        strength: of the noise.
        each_draws: whether images have generators of their own.

    Raises:
        UsageError: another number of pictures or masks than divides ``count``.
    """
    record, step = program.record, start_of(program, strength)
    shape = program.latent_shape(count, (images.shape[2], images.shape[3]))
    turns = _turns("image", len(images), count)
    repeats = turns if each_draws and masks is None else np.arange(len(images))
    means, deviations = _encoded(program, images)
    before = tuple(record.noise.before) if record.noise else shape[1:]
    sampled = means[repeats] + deviations[repeats] * _packed(record, draw((len(repeats), *before)))
    latent = sampled if len(repeats) == count else sampled[turns]
    noise = _packed(record, draw((count, *before)))
    factors = factors_of_noise(program.bundle, step)
    begin = factors[0] * latent + factors[1] * noise
    kept = None
    if masks is not None:
        draw((max(len(images), len(masks)), *before))  # for the masked picture's latent, which such models do not read
        mask = _mask_of_latent(masks, before, record)[_turns("mask_image", len(masks), count)]
        kept = Kept(latent, noise, mask)
        if strength == 1:
            begin = program.bundle.tables["solver.rows"][0, 0] * noise
    draws = np.count_nonzero(program.bundle.tables["start.draws"][step])
    drawn = np.stack([draw(shape) for _ in range(draws)], axis=1) if draws else np.zeros((count, 0))
    return Origin(step, begin.astype(np.float32), drawn, kept)


def pixels_of_pictures(pictures: Any, size: tuple[int, int], name: str = "image", channels: int = 3) -> np.ndarray:
    """Return pictures as ``[n, channels, height, width]`` float32 in [0, 1], resized as diffusers does it.

    Args:
        pictures: one or a list: of PIL, resized by Lanczos; arrays ``[height, width, channels]`` or ``[n, …]``, or
            tensors ``[channels, height, width]`` or ``[n, …]``, in [0, 1], resized to the nearest pixel.
        channels: 3 for RGB; 1 makes everything grey.

    Raises:
        UsageError: no picture, another mode, or values beyond [0, 1].
    """
    listed = pictures if isinstance(pictures, list | tuple) else [pictures]
    return np.concatenate([_pixels(each, size, name, channels) for each in listed])


def mask_of_pictures(pictures: Any, size: tuple[int, int]) -> np.ndarray:
    """Return masks ``[n, 1, height, width]`` float32: 1 where a picture, as above, is at least half bright, else 0."""
    return (pixels_of_pictures(pictures, size, "mask_image", 1) >= 0.5).astype(np.float32)


def _pixels(picture: Any, size: tuple[int, int], name: str, channels: int) -> np.ndarray:
    if isinstance(picture, Image.Image):
        if channels == 3 and picture.mode != "RGB":
            raise UsageError(f"{name} is of mode {picture.mode}; give {name}.convert('RGB')")
        resized = picture.resize(size[::-1], Image.Resampling.LANCZOS)
        values = np.asarray(resized.convert("L") if channels == 1 else resized, np.float32) / 255
        return np.ascontiguousarray(values.reshape(1, *size, channels).transpose(0, 3, 1, 2))
    if not is_torch(picture) and not isinstance(picture, np.ndarray):
        raise UsageError(f"{name} is a {type(picture).__name__}; give a picture of PIL, an array or a tensor")
    values = to_array(picture)
    if channels == 1 and values.ndim == 2:
        values = values[None] if is_torch(picture) else values[..., None]
    values = values[None] if values.ndim == 3 else values
    if values.ndim == 4 and not is_torch(picture):
        values = values.transpose(0, 3, 1, 2)
    if values.ndim != 4 or values.shape[1] != channels or 0 in values.shape:
        form = "[channels, height, width]" if is_torch(picture) else "[height, width, channels]"
        raise UsageError(f"{name} is {list(picture.shape)}; give {form} of {channels} channels, or several")
    if not (values.min() >= 0 and values.max() <= 1):  # not a number is neither
        raise UsageError(f"{name} has values from {values.min():g} to {values.max():g}; give numbers from 0 to 1")
    return _nearest(values.astype(np.float32), size)


def _nearest(values: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Return ``[n, channels, height, width]`` at another size, as torch's ``interpolate`` picks pixels."""
    rows, columns = (
        np.minimum(np.floor(np.arange(side) * np.float32(own / side)).astype(int), own - 1)
        for side, own in zip(size, values.shape[2:], strict=True)
    )
    return np.ascontiguousarray(values[:, :, rows][..., columns])


def _sides(picture: Any) -> tuple[int, int]:
    if isinstance(picture, Image.Image):
        return picture.height, picture.width
    shape = tuple(getattr(picture, "shape", ()))
    if len(shape) < 3:
        raise UsageError(f"image is a {type(picture).__name__}; give a picture of PIL, an array or a tensor")
    height, width = shape[-2:] if is_torch(picture) else shape[-3:-1]
    return height, width


def _turns(name: str, given: int, count: int) -> np.ndarray:
    if count % given:
        raise UsageError(f"{given} of {name} for {count} images; give one, one for each, or a number that divides it")
    return np.arange(count) % given


def _encoded(program: Program, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and deviation of the latents of pictures in [-1, 1]."""
    record = program.record.encoder
    assert record is not None
    cell, (count, channels, height, width) = program.record.cell, images.shape
    parts = []
    for rows in batches_of(program.record, count):
        own = images[rows].reshape(len(rows), channels, height // cell, cell, width // cell, cell)
        parts.append(program.runner.run(record.file, {record.input.name: own}))
    mean, deviation = (
        np.concatenate([part[name] for part in parts])[:count] for name in (record.mean.name, record.deviation.name)
    )
    return mean, deviation


def _packed(record: BundleRecord, noise: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(record.noise(noise)) if record.noise else noise


def _mask_of_latent(masks: np.ndarray, before: Sequence[int], record: BundleRecord) -> np.ndarray:
    """Return masks as they lie on latents."""
    small = _nearest(masks, before[1:])
    return _packed(record, np.broadcast_to(small, (len(small), *before))) if record.noise else small
