"""Where a backend runs, as users name it: ``cpu``, ``cuda``, or ``cuda:1`` for one GPU of several. Free of torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

from dipgo.base.errors import UsageError

_NAME = re.compile(r"(cpu|cuda)(?::(\d{1,3}))?", re.ASCII)


@dataclass(frozen=True)
class Place:
    """A kind of device, ``cpu`` or ``cuda``; ``index`` is a GPU's number from 0, None the current one."""

    kind: str
    index: int | None = None

    def __str__(self) -> str:
        return self.kind if self.index is None else f"{self.kind}:{self.index}"


def place_of(device: str) -> Place:
    """Return what a name such as ``cuda:1`` stands for.

    Raises:
        UsageError: no such name.
    """
    name = _NAME.fullmatch(device)
    if name is None or (name[1] == "cpu" and name[2]):
        raise UsageError(f"device '{device}': unknown; give cpu, cuda, or cuda:N for a GPU by its number from 0")
    return Place(name[1], None if name[2] is None else int(name[2]))


def check_index(index: int | None, count: int) -> None:
    """Refuse the number of a GPU that is not there.

    Raises:
        UsageError: there are only ``count``.
    """
    if index is not None and index >= count:
        there = "no GPU can be used here" if not count else f"there are {count} GPUs, 0 to {count - 1}"
        raise UsageError(f"device 'cuda:{index}': {there if count != 1 else 'there is 1 GPU, cuda:0'}; give another")
