"""Graphs as the bundle's record has them: files, sizes, and what goes in and out. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from dipgo.base.dtypes import BY_ONNX, Dtype
from dipgo.base.errors import DipgoError
from dipgo.base.inputs import read_input
from dipgo.base.records import Count, FileName, Line, Record

Size = Annotated[int, Field(ge=0, lt=2**31)] | Annotated[str, Field(pattern=r"^[a-z0-9+*/() -]{1,200}$")]
"""A size: a whole number, or an expression over :attr:`BundleRecord.axes` (:mod:`export.axes` evaluates it)."""
Shape = Annotated[list[Size], Field(max_length=8)]
DtypeName = Annotated[str, Field(pattern=f"^({'|'.join(dtype.value for dtype in Dtype)})$")]


class TensorRecord(Record):
    """A graph's input or output; ``dtype`` is numpy's name."""

    name: Line
    dtype: DtypeName
    shape: Shape


Tensors = Annotated[list[TensorRecord], Field(max_length=10_000)]


class BranchRecord(Record):
    """A layer of the denoiser with a low-rank branch: the inputs that hold its matrices, and their place in each."""

    layer: Line
    down: Line
    down_place: Count
    up: Line
    up_place: Count


class AxisRecord(Record):
    """The range of a size that is chosen when the program runs: multiples of ``multiple`` from ``min`` to ``max``.

    ``opt`` is what engines are made fastest at, where they are made for a range.
    """

    min: int = Field(ge=1)
    opt: int = Field(ge=1)
    max: int = Field(ge=1, lt=2**31)
    multiple: int = Field(ge=1, default=1)

    @model_validator(mode="after")
    def _is_ordered(self) -> AxisRecord:
        if not self.min <= self.opt <= self.max or any(size % self.multiple for size in (self.min, self.opt, self.max)):
            raise ValueError("min, opt and max must be multiples of 'multiple', in this order")
        return self


class RowRecord(Record):
    """A graph input that is a row of a table: ``tensor[step]`` or ``tensor[step, term]``, broadcast to the input.

    Of a term there may be a row for each pass of guidance, the unconditional first: it is that of every image there.
    """

    tensor: Line
    term: int | None = Field(ge=0, default=None)

    def read(self, tables: Mapping[str, np.ndarray], step: int, shape: Sequence[int]) -> np.ndarray:
        """Return the row for a step in the input's shape: reshaped where the sizes agree, else repeated by batch."""
        row = tables[self.tensor][step] if self.term is None else tables[self.tensor][step, self.term]
        if self.by_pass(tables):
            row = np.repeat(row, shape[0] // len(row), axis=0)
        return row.reshape(shape) if row.size == prod(shape) else np.broadcast_to(row, shape)

    def fits(self, table: Sequence[int], shape: Sequence[int]) -> bool:
        """Whether :meth:`read` can make a row of a table of this shape into the input's shape."""
        row = table[1:] if self.term is None else table[2:]
        if self.term is not None and not (len(table) > 1 and self.term < table[1]):
            return False
        if self.term is not None and len(table) == 4:
            row = (row[0] * (shape[0] // row[0]) if shape and row[0] else 0, *row[1:])
        try:
            return prod(row) == prod(shape) or np.broadcast_shapes(row, shape) == tuple(shape)
        except ValueError:
            return False

    def by_pass(self, tables: Mapping[str, np.ndarray]) -> bool:
        """Return whether the passes of guidance have rows of their own."""
        return self.term is not None and tables[self.tensor].ndim == 4


class GraphRecord(Record):
    """One graph of the loop.

    ``signature`` names the sites that it computes, as a string of 0 and 1 over the SubNet's sites. ``rows`` are the
    inputs that come from :attr:`BundleRecord.tables_file`; the others are conditions, values of prologues, and slots.
    """

    file: FileName
    signature: str = Field(pattern="^[01]*$")
    macs: Count
    parameters: Count
    inputs: Tensors
    outputs: Tensors
    rows: dict[Line, RowRecord]


class PrologueRecord(Record):
    """A graph that runs before the loop and hands values to the loop's graphs.

    ``steps``: once for all steps; the rows of its batch are [step, pass, image], the passes being those of guidance.
    ``prompt``: once a prompt or class, on the batch of a step. ``rows`` are inputs from the tables.
    """

    file: FileName
    kind: Literal["steps", "prompt"]
    macs: Count
    parameters: Count
    inputs: Tensors
    outputs: Tensors
    rows: dict[Line, RowRecord]


@dataclass(frozen=True)
class Signature:
    """What an ONNX file says of itself: inputs and outputs, and the files in which its weights lie."""

    inputs: list[TensorRecord]
    outputs: list[TensorRecord]
    weights: set[str]


def read_signature(path: Path, cure: str) -> Signature:
    """Read an ONNX file's signature; weights are not read.

    Raises:
        DipgoError: not an ONNX file, or one with inputs or outputs that no program has.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    content = read_input(path, "graph")
    try:
        graph = onnx.load_model_from_string(content).graph
        own = {tensor.name for tensor in graph.initializer}
        return Signature(
            [_tensor(value) for value in graph.input if value.name not in own],
            [_tensor(value) for value in graph.output],
            {entry.value for tensor in graph.initializer for entry in tensor.external_data if entry.key == "location"},
        )
    except (DecodeError, KeyError, ValueError) as error:
        raise DipgoError(f"{path}: not a graph that a program can run ({error}); {cure}") from error


def _tensor(value: Any) -> TensorRecord:
    kind = value.type.tensor_type
    shape = [size.dim_param or size.dim_value for size in kind.shape.dim]
    return TensorRecord(name=value.name, dtype=BY_ONNX[kind.elem_type].value, shape=shape)
