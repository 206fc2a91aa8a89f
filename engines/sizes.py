"""Sizes of a request against what a bundle was compiled for: one size, or ranges."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dipgo.base.errors import UsageError
from export.axes import shape_at, values_at
from export.records.bundle import BundleRecord


def axes_of(record: BundleRecord, shape: Sequence[int]) -> dict[str, int]:
    """Return the values of the bundle's axes in a latent of this shape.

    Raises:
        UsageError: a shape that the bundle was not compiled for.
    """
    axes, latent = record.axes, record.latent.shape
    sizes = {str(name): int(size) for name, size in zip(latent, shape, strict=False) if name in axes}
    outside = any(
        not axes[name].min <= size <= axes[name].max or size % axes[name].multiple for name, size in sizes.items()
    )
    if outside or len(sizes) < len(axes) or tuple(shape) != shape_at(latent, sizes):
        raise UsageError(f"noise is {list(shape)}, the bundle was compiled for {_latent_text(record)}")
    return sizes


def latent_shape_of(record: BundleRecord, noise: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of the latents ``[n, …]`` that noise of a shape is for.

    Raises:
        UsageError: not as much of it as the sampler draws.
    """
    pieces = 1 + record.solver.draws
    if pieces == 1:
        return tuple(noise)
    if tuple(noise[1:2]) != (pieces,):
        raise UsageError(
            f"noise is {list(noise)}; this sampler draws it {record.solver.draws} times on its way, and each image "
            f"takes {pieces} of it: [n, {pieces}, …]"
        )
    return noise[0], *noise[2:]


def batch_of(record: BundleRecord) -> int:
    """Return how many images a batch has: the bundle's number, or the largest."""
    return shape_at(record.latent.shape, values_at(record.axes, "max"))[0]


def batches_of(record: BundleRecord, count: int) -> list[np.ndarray]:
    """Return which of ``count`` images go together; the last batch is filled up with the last image."""
    largest, axis, batches = batch_of(record), record.axes.get("batch"), []
    for start in range(0, count, largest):
        length = largest if axis is None else max(min(largest, count - start), axis.min)
        batches.append(np.arange(start, start + length).clip(max=count - 1))
    return batches


def image_shape(record: BundleRecord, size: tuple[int, int], where: str) -> tuple[int, ...]:
    """Return the shape of one image's latent for a height and width in pixels.

    Raises:
        UsageError: a size that the bundle, which lies ``where``, does not take.
    """
    image, sides = record.latent.shape[1:], []
    if record.pixels:
        for name, own, pixels in zip(("height", "width"), record.pixels, size, strict=True):
            if pixels != own:
                raise UsageError(
                    f"{where}: {name} {pixels}, it takes {own} alone; give that, or search at another size"
                )
        return tuple(int(side) for side in image)
    for name, side, pixels in zip(("height", "width"), image[-2:], size, strict=True):
        axis, cell = record.axes.get(str(side)), record.cell
        low, high, step = (axis.min, axis.max, axis.multiple) if axis else (int(side), int(side), 1)
        if pixels % (step * cell) or not low <= pixels // cell <= high:
            takes = f"multiples of {step * cell} from {low * cell} to {high * cell}" if axis else str(low * cell)
            raise UsageError(f"{where}: {name} {pixels}, it takes {takes}; give that, or export it with --size")
        sides.append(pixels // cell)
    return (*(int(side) for side in image[:-2]), *sides)


def _latent_text(record: BundleRecord) -> str:
    """Return the latent's shape, ranges where it has axes."""
    parts = []
    for size in record.latent.shape:
        axis = record.axes.get(str(size))
        step = f" by {axis.multiple}" if axis and axis.multiple > 1 else ""
        parts.append(f"{axis.min} to {axis.max}{step}" if axis else str(size))
    return f"[{', '.join(parts)}]"
