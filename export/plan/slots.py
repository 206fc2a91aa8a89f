"""Slots: the least memory that holds the values which launches hand to each other.

A value lives from the launch that writes it to the last one that reads it. Values of one shape and dtype whose lives
do not overlap share a slot. A slot that a launch reads is not written in the same launch, so a backend may run in
place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from dipgo.base.dtypes import Dtype
from export.axes import shape_at
from export.plan.launches import Launch, Value
from export.records.graphs import TensorRecord
from export.records.program import SlotRecord


@dataclass(frozen=True)
class Allocation:
    """Which slot holds each value, and the slots themselves."""

    slot_of: dict[Value, int]
    slots: list[SlotRecord]


def prune(launches: Sequence[Launch], until: Mapping[Value, int]) -> list[Launch]:
    """Leave out the writes that no launch reads, but for the values ``until`` names."""
    needed = set(until).union(*(launch.reads.values() for launch in launches))
    return [
        replace(launch, writes={name: value for name, value in launch.writes.items() if value in needed})
        for launch in launches
    ]


def allocate(
    launches: Sequence[Launch],
    tensors: Mapping[str, TensorRecord],
    initial: Sequence[Value] = (),
    until: Mapping[Value, int] | None = None,
    largest: Mapping[str, int] | None = None,
) -> Allocation:
    """Allocate slots greedily by lifetime.

    Args:
        tensors: what each value is, by its name.
        initial: values that are there before the first launch.
        until: values that must stay readable up to a launch, by its number, whether or not it reads them.
        largest: values of the axes, at which bytes are counted.
    """
    last = dict(until or {})
    for number, launch in enumerate(launches):
        for value in launch.reads.values():
            last[value] = max(number, last.get(value, 0))

    slots: list[SlotRecord] = []
    free_from: list[int] = []  # per slot, the first launch that may write it again
    slot_of: dict[Value, int] = {}

    def place(value: Value, number: int) -> None:
        tensor = tensors[value[0]]
        record = SlotRecord(dtype=tensor.dtype, shape=tensor.shape, bytes=bytes_of(tensor, largest))
        slot = next((k for k, slot in enumerate(slots) if slot == record and free_from[k] <= number), len(slots))
        if slot == len(slots):
            slots.append(record)
            free_from.append(0)
        free_from[slot] = last[value] + 1
        slot_of[value] = slot

    for value in initial:
        place(value, 0)
    for number, launch in enumerate(launches):
        for value in launch.writes.values():
            if value not in slot_of:
                place(value, number)
    return Allocation(slot_of, slots)


def bytes_of(tensor: TensorRecord, values: Mapping[str, int] | None = None) -> int:
    """Return what a tensor takes in memory, for values of the axes."""
    return prod(shape_at(tensor.shape, values or {})) * Dtype(tensor.dtype).itemsize
