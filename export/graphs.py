"""Graphs as the bundle's record has them: files, sizes, and what goes in and out. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Literal

import numpy as np

from dipgo.base.records import Record

Size = int | str
"""A size: a whole number, or an expression over :attr:`BundleRecord.axes` (:mod:`export.axes` evaluates it)."""


class TensorRecord(Record):
    """A graph's input or output; ``dtype`` is numpy's name."""

    name: str
    dtype: str
    shape: list[Size]


class AxisRecord(Record):
    """The range of a size that is chosen when the program runs: multiples of ``multiple`` from ``min`` to ``max``.

    ``opt`` is what engines are made fastest at, where they are made for a range.
    """

    min: int
    opt: int
    max: int
    multiple: int = 1


class RowRecord(Record):
    """A graph input that is a row of a table: ``tensor[step]`` or ``tensor[step, term]``, broadcast to the input.

    Of a term there may be a row for each pass of guidance, the unconditional first: it is that of every image there.
    """

    tensor: str
    term: int | None = None

    def read(self, tables: Mapping[str, np.ndarray], step: int, shape: Sequence[int]) -> np.ndarray:
        """Return the row for a step in the input's shape: reshaped where the sizes agree, else repeated by batch."""
        row = tables[self.tensor][step] if self.term is None else tables[self.tensor][step, self.term]
        if self.by_pass(tables):
            row = np.repeat(row, shape[0] // len(row), axis=0)
        return row.reshape(shape) if row.size == prod(shape) else np.broadcast_to(row, shape)

    def by_pass(self, tables: Mapping[str, np.ndarray]) -> bool:
        """Return whether the passes of guidance have rows of their own."""
        return self.term is not None and tables[self.tensor].ndim == 4


class GraphRecord(Record):
    """One graph of the loop.

    ``signature`` names the sites that it computes, as a string of 0 and 1 over the SubNet's sites. ``rows`` are the
    inputs that come from :attr:`BundleRecord.tables_file`; the others are conditions, values of prologues, and slots.
    """

    file: str
    signature: str
    macs: int
    parameters: int
    inputs: list[TensorRecord]
    outputs: list[TensorRecord]
    rows: dict[str, RowRecord]


class PrologueRecord(Record):
    """A graph that runs before the loop and hands values to the loop's graphs.

    ``steps``: once for all steps; the rows of its batch are [step, pass, image], the passes being those of guidance.
    ``prompt``: once a prompt or class, on the batch of a step. ``rows`` are inputs from the tables.
    """

    file: str
    kind: Literal["steps", "prompt"]
    macs: int
    parameters: int
    inputs: list[TensorRecord]
    outputs: list[TensorRecord]
    rows: dict[str, RowRecord]
