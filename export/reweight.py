"""A bundle for other weights of the same architecture: a fine-tune, or a pipeline with a LoRA fused into it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dipgo.base.dtypes import PRECISIONS
from dipgo.base.errors import DipgoError
from dipgo.model.models import Model
from dipgo.schedule.subnet import load_subnet
from export.bundle import Bundle
from export.compiler import compile_subnet
from export.config import ExportConfig
from export.records.bundle import BundleRecord
from export.records.graphs import AxisRecord


def reweight(bundle: Bundle, model: Model, folder: str | Path, force: bool = False) -> BundleRecord:
    """Write a bundle of the same programs and sizes with another model's weights; nothing is searched.

    Graphs are converted from what earlier exports kept (:mod:`export.onnx.cache`); tables, prologues and constants are
    made again, since they follow from weights. The schedules are those of the old weights: ``dipgo judge --model`` says
    what they are worth on the new ones.

    Raises:
        DipgoError: a model of another class or configuration, or one whose checkpoint lacks tensors.
        UsageError: see :func:`export.compiler.compile_subnet`.
    """
    identity, mine = model.identity(), bundle.record.model
    for what, own, theirs in (
        ("class", mine.class_name, identity.class_name),
        ("configuration", mine.config_sha256, identity.config_sha256),
    ):
        if own != theirs:
            raise DipgoError(
                f"'{model.name}' is no other weights of '{mine.name}': its {what} ({theirs[:32]}) is not the bundle's "
                f"({own[:32]}); search on it"
            )
    subnets = [load_subnet(bundle.folder / each.subnet_file) for each in bundle.record.programs]
    own_weights = [replace(subnet, model=identity) for subnet in subnets]
    return compile_subnet(own_weights, model, folder, config_of(bundle.record, model), force)


def config_of(record: BundleRecord, model: Model) -> ExportConfig:
    """Return the options of the export that a bundle came from, but for how weights were kept: they are copied."""
    sides = record.latent.shape[-2:]
    height, width = (_text(record, size, record.cell) for size in sides)
    own = [str(side * record.cell) for side in model.family.latent(model.config)[-2:]]
    return ExportConfig(
        graphs=record.layout,
        dtype=next(name for name, dtype in PRECISIONS.items() if dtype.value == record.dtype),
        batch=_text(record, record.latent.shape[0], 1),
        size=None if record.pixels or [height, width] == own else f"{height}x{width}",
        image=record.start is not None,
        unguided=record.unguided is not None,
        lora_rank=record.adapters.rank if record.adapters else 0,
        pipeline=record.decoder is not None or record.conditioning.encoder is not None,
    )


def _text(record: BundleRecord, size: int | str, unit: int) -> str:
    """Return a size as options have it, in pixels or images."""
    axis = record.axes.get(str(size))
    if not isinstance(axis, AxisRecord):
        return str(int(size) * unit)
    return ":".join(str(value * unit) for value in (axis.min, axis.opt, axis.max))
