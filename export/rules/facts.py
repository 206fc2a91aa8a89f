"""What rules are about: a program's record and its tables, with every tensor at all corners of the axes' ranges."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np

from export.axes import shape_at
from export.records.bundle import BundleRecord
from export.records.graphs import GraphRecord, PrologueRecord, Size, TensorRecord
from export.records.program import SlotRecord

Problems = Iterator[str]
Tables = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Value:
    """A tensor as what it is bound to must be: its type, and its shapes at all corners of the axes' ranges."""

    dtype: str
    shapes: tuple[tuple[int, ...], ...]

    @property
    def is_real(self) -> bool:
        return "float" in self.dtype

    def at_step(self, steps: int) -> Value | None:
        """Return one of ``steps`` equal parts of the first dimension; None where there are no such."""
        if any(not shape or shape[0] % steps for shape in self.shapes):
            return None
        return Value(self.dtype, tuple((shape[0] // steps, *shape[1:]) for shape in self.shapes))


class Facts:
    """A program as rules see it.

    Attributes:
        calls: of the denoiser in a trajectory.
        corners: the axes' values at all ends of their ranges.
    """

    def __init__(self, record: BundleRecord, tables: Tables) -> None:
        self.record, self.tables = record, tables
        self.calls = len(record.steps)
        ends = [sorted({axis.min, axis.opt, axis.max}) for axis in record.axes.values()]
        self.corners = [dict(zip(record.axes, values, strict=True)) for values in product(*ends)]
        self._values: dict[tuple[str, tuple[Size, ...]], Value] = {}

    def value(self, tensor: TensorRecord | SlotRecord) -> Value:
        key = tensor.dtype, tuple(tensor.shape)
        if key not in self._values:
            self._values[key] = Value(tensor.dtype, tuple(shape_at(tensor.shape, sizes) for sizes in self.corners))
        return self._values[key]

    @cached_property
    def latent(self) -> Value:
        return self.value(self.record.latent)

    @cached_property
    def inputs(self) -> dict[str, Value]:
        """The conditions, by name."""
        return {tensor.name: self.value(tensor) for tensor in self.record.conditioning.inputs}

    @cached_property
    def passes(self) -> int:
        """The passes of guidance that a step computes."""
        return 2 if self.record.conditioning.guided else 1

    @cached_property
    def sources(self) -> dict[str, Value]:
        """What steps read beside slots and tables, by name: conditions, and what prologues compute of them."""
        values: dict[str, Value] = {}
        for prologue in self.record.prologues:
            values |= self.results(prologue)
        return values | self.inputs | self.matrices

    @cached_property
    def matrices(self) -> dict[str, Value]:
        """Those of low-rank branches, by name."""
        adapters = self.record.adapters
        return {tensor.name: self.value(tensor) for tensor in adapters.inputs} if adapters else {}

    def slot(self, number: int) -> Value | None:
        return self.value(self.record.slots[number]) if number < len(self.record.slots) else None

    def steps_of(self, prologue: PrologueRecord) -> int:
        return self.calls if prologue.kind == "steps" else 1

    def results(self, prologue: PrologueRecord) -> dict[str, Value]:
        """Return what a prologue computes for one step, by name."""
        values = {tensor.name: self.value(tensor).at_step(self.steps_of(prologue)) for tensor in prologue.outputs}
        return {name: value for name, value in values.items() if value is not None}

    def has_source(self, graph: GraphRecord, name: str, value: Value) -> bool:
        if name not in graph.rows:
            return name == "timestep" or self.sources.get(name) == value
        row = graph.rows[name]
        table = self.tables.get(row.tensor)
        if table is None or len(table) != self.calls:
            return False
        return all(row.fits(table.shape, shape) for shape in value.shapes)
