"""The guidance of a request, as the conditions of a bundle that lets it be chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dipgo.base.dtypes import Dtype
from dipgo.base.errors import UsageError
from dipgo.base.guidance import RESCALE
from export.records.bundle import BundleRecord


@dataclass(frozen=True)
class Guidance:
    """What a request says of guidance; None is the SubNet's own.

    Attributes:
        scale: for all images, or one for each.
        rescale: from 0 to 1, see :func:`dipgo.model.guidance.rescaled`.
    """

    scale: float | Sequence[float] | None = None
    rescale: float | None = None


def is_off(record: BundleRecord, guidance: Guidance) -> bool:
    """Whether a pipeline makes one pass of guidance where the bundle makes two: the scale is not above 1, mostly."""
    how, scale = record.conditioning.guidance, guidance.scale
    return how is not None and how.off is not None and isinstance(scale, float | int) and scale <= how.off


def check_guidance(record: BundleRecord, guidance: Guidance) -> None:
    """Refuse guidance that a bundle cannot serve: it is not finite, or compiled in.

    Raises:
        UsageError: with what is asked for, and the bundle's own.
    """
    own, how = record.sampler, record.conditioning.guidance
    for scale in [] if guidance.scale is None else np.atleast_1d(guidance.scale).tolist():
        if not isinstance(scale, float | int) or not np.isfinite(scale):
            raise UsageError(f"guidance_scale = {scale}; give a finite number")
        if how is None and abs(scale - own.guidance_scale) > 1e-6 and not max(scale, own.guidance_scale) <= 1:
            passes = "both passes" if record.conditioning.guided else "one pass per step"
            raise UsageError(
                f"guidance_scale = {scale:g}, the bundle was compiled for {own.guidance_scale:g} alone, with {passes}; "
                "ask for that, or search and export at this one"
            )
    rescale = guidance.rescale
    if rescale is None:
        return
    if not isinstance(rescale, float | int) or not 0 <= rescale <= 1:
        raise UsageError(f"guidance_rescale = {rescale}; give a number from 0 to 1")
    if not record.conditioning.guided:  # there is nothing to rescale
        return
    if abs(rescale - own.guidance_rescale) > 1e-6 and (how is None or RESCALE not in record.conditioning.fixed):
        raise UsageError(
            f"guidance_rescale = {rescale:g}, the bundle was compiled for {own.guidance_rescale:g}; ask for that, or "
            "search with --guidance-rescale"
        )


def fixed_conditions(record: BundleRecord, rows: int, guidance: Guidance = Guidance()) -> dict[str, np.ndarray]:
    """Return the conditions that no prompt changes, ``rows`` of each: those that guidance is by among them.

    Raises:
        UsageError: see :func:`check_guidance`; or another number of scales than of images.
    """
    fixed = record.conditioning.fixed
    conditions = {
        tensor.name: np.tile(np.array(fixed[tensor.name], np.float32), rows)
        .reshape(rows, *(int(side) for side in tensor.shape[1:]))
        .astype(Dtype(tensor.dtype).numpy)
        for tensor in record.conditioning.inputs
        if tensor.name in fixed
    }
    return conditions | _chosen(record, conditions, guidance, rows // (1 + record.conditioning.guided))


def _chosen(
    record: BundleRecord, conditions: Mapping[str, np.ndarray], guidance: Guidance, images: int
) -> dict[str, np.ndarray]:
    """Return the conditions that follow a request's guidance, of the shapes and dtypes of the bundle's own."""
    check_guidance(record, guidance)
    how, made = record.conditioning.guidance, dict[str, np.ndarray]()
    if how is None:
        return made
    if guidance.scale is not None:
        scales = np.atleast_1d(np.asarray(guidance.scale, np.float64))
        if len(scales) not in (1, images):
            raise UsageError(f"{len(scales)} guidance scales for {images} images; give one, or one for each")
        if how.off is not None:
            scales = np.where(scales <= how.off, how.neutral, scales)
        made = {name: _rows(factor * scales, conditions[name]) for name, factor in how.inputs.items()}
    if guidance.rescale is not None and RESCALE in conditions:
        made[RESCALE] = _rows(np.array([guidance.rescale]), conditions[RESCALE])
    return made


def _rows(values: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Return numbers, of one or all images, as the rows of both passes."""
    rows = np.resize(values, len(like)).reshape(-1, *[1] * (like.ndim - 1))
    return np.broadcast_to(rows, like.shape).astype(like.dtype)
