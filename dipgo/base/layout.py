"""Layouts: how the numbers of one tensor lie in another, as where a pipeline packs its latents. Free of torch."""

from __future__ import annotations

from math import prod
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from dipgo.base.records import Record

Side = Annotated[int, Field(ge=1, lt=2**31)]


class Layout(Record):
    """``[B, *before]`` to ``[B, *after]``: each axis cut into parts, the parts put in another order, and joined.

    Attributes:
        before, after: the shapes, without the batch.
        parts: what ``before`` is cut into.
        order: the part that stands at each place of ``after``.
    """

    before: list[Side] = Field(max_length=8)
    parts: list[Side] = Field(max_length=32)
    order: list[Annotated[int, Field(ge=0, lt=32)]] = Field(max_length=32)
    after: list[Side] = Field(max_length=8)

    def __call__(self, values: Any) -> Any:
        """Return an array or a torch tensor ``[B, *before]`` laid out anew, ``[B, *after]``."""
        cut = values.reshape(len(values), *self.parts)
        order = (0, *(1 + part for part in self.order))
        moved = cut.transpose(order) if isinstance(values, np.ndarray) else cut.permute(order)
        return moved.reshape(len(values), *self.after)

    @property
    def inverse(self) -> Layout:
        """The way back."""
        parts = [self.parts[part] for part in self.order]
        return Layout(before=self.after, parts=parts, order=list(map(int, np.argsort(self.order))), after=self.before)

    @property
    def fits(self) -> bool:
        """Whether shapes, parts and order agree."""
        return sorted(self.order) == list(range(len(self.parts))) and prod(self.before) == prod(self.parts) == prod(
            self.after
        )

    @property
    def idle(self) -> bool:
        """Whether it changes nothing."""
        return self.before == self.after and self.order == sorted(self.order)


def find_layout(places: np.ndarray, before: tuple[int, ...]) -> Layout | None:
    """Return the layout that moves number ``places[i]`` of a tensor of shape ``before``, counted flat, to place ``i``.

    ``places`` has the shape of the result. None where no cutting and reordering of axes does it.
    """
    if places.size != prod(before):
        return None
    digits: list[tuple[int, int]] = []  # length of a part and how far apart its numbers lie before, in order of after
    for axis, length in enumerate(places.shape):
        line = np.moveaxis(places, axis, 0).reshape(length, -1)[:, 0]
        digits += _digits(line - line[0])
    order = np.argsort([-stride for _, stride in digits], kind="stable")  # parts as they lie before
    layout = Layout(
        before=list(before),
        parts=[digits[part][0] for part in order],
        order=list(map(int, np.argsort(order))),
        after=list(places.shape),
    )
    if prod(layout.parts) != places.size:
        return None
    moved = layout(np.arange(places.size).reshape(1, *before))[0]
    return layout if np.array_equal(moved, places) else None


def _digits(line: np.ndarray) -> list[tuple[int, int]]:
    """Return ``(length, stride)`` of the parts that an axis is made of, the outermost first."""
    if len(line) == 1:
        return []
    stride = int(line[1])
    straight = next((place for place in range(1, len(line)) if line[place] != place * stride), len(line))
    inner = next(length for length in range(straight, 0, -1) if len(line) % length == 0)
    if inner == 1:
        return [(len(line), stride)]  # no part at all, which the check finds
    return [*_digits(line[::inner]), (inner, stride)]
