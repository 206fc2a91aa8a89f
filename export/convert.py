"""torch to ONNX IR, the one place that calls the exporter."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch

from dipgo.errors import DipgoError
from export.bundle import TensorRecord

OPSET = 23  # from 23 on attention stays one Attention node and GroupNorm one GroupNormalization


def convert(
    what: str, program: Any, args: Sequence[Any] | None, inputs: Sequence[str], outputs: Sequence[str], optimize: bool
) -> ir.Model:
    """Convert an exported program, or a module with example arguments, to ONNX.

    Raises:
        DipgoError: ``what`` has no ONNX form; the message holds the exporter's first words on it.
    """
    try:
        with _quiet(), torch.no_grad():
            converted = torch.onnx.export(
                program,
                () if args is None else tuple(args),
                dynamo=True,
                optimize=optimize,
                opset_version=OPSET,
                input_names=list(inputs),
                output_names=list(outputs),
                verbose=False,
            )
    except Exception as error:
        detail = " ".join(str(error).split())[:300]
        raise DipgoError(f"{what} has no ONNX form: {detail}") from error
    assert converted is not None
    return converted.model


def tensor_record(value: ir.Value) -> TensorRecord:
    """Describe a static graph input or output."""
    assert value.name is not None
    assert value.dtype is not None
    assert value.shape is not None
    return TensorRecord(name=value.name, dtype=str(value.dtype.numpy()), shape=list(value.shape.numpy()))


@contextmanager
def _quiet() -> Iterator[None]:
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)  # it warns of every torchvision operator that is not installed
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        registration.setLevel(level)
