"""Slots: the least memory that holds the cached features of a schedule.

A feature lives from the step that stores it to the last step that reads it. Features of one shape whose lives do not
overlap share a slot. A slot that a step reads is not written in the same step, so a backend may run in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dipgo.liveness import StepPlan
from export.bundle import SlotRecord, TensorRecord

Feature = tuple[int, int, int]  # step that stored it, site, output


@dataclass(frozen=True)
class Allocation:
    """Which slot holds each stored feature, and the slots themselves."""

    slot_of: dict[Feature, int]
    slots: list[SlotRecord]


def allocate(plans: Sequence[StepPlan], tensors: Sequence[Sequence[TensorRecord]]) -> Allocation:
    """Allocate slots greedily by lifetime; ``tensors[site][output]`` describes each feature."""
    last_read: dict[tuple[int, int], int] = {}
    for step, plan in enumerate(plans):
        for site, sources in plan.served.items():
            for source in sources:
                last_read[source, site] = step

    slots: list[SlotRecord] = []
    free_from: list[int] = []  # per slot, the first step that may write it again
    slot_of: dict[Feature, int] = {}
    for step, plan in enumerate(plans):
        for site in sorted(plan.stored):
            for output, tensor in enumerate(tensors[site]):
                wanted = SlotRecord(dtype=tensor.dtype, shape=tensor.shape, bytes=_bytes(tensor))
                slot = next((k for k, held in enumerate(slots) if held == wanted and free_from[k] <= step), len(slots))
                if slot == len(slots):
                    slots.append(wanted)
                    free_from.append(0)
                free_from[slot] = last_read[step, site] + 1
                slot_of[step, site, output] = slot
    return Allocation(slot_of, slots)


def naive_bytes(tensors: Sequence[Sequence[TensorRecord]], terms: int) -> int:
    """Return what the cache would take if the last ``terms`` outputs of every site were kept."""
    return terms * sum(_bytes(tensor) for outputs in tensors for tensor in outputs)


def _bytes(tensor: TensorRecord) -> int:
    import numpy as np

    count = 1
    for size in tensor.shape:
        count *= size
    return count * np.dtype(tensor.dtype).itemsize
