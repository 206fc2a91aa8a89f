"""What a module hands out, as the tensors that are cached of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

Rebuild = Callable[[Sequence[torch.Tensor]], Any]


def take_apart(output: Any) -> tuple[list[torch.Tensor], Rebuild]:
    """Return the distinct tensors in a module's output, and how to put others in their places.

    A tensor that stands in the output twice counts once: a UNet's down block hands out its last hidden state also as
    a skip connection.
    """
    leaves, tree = pytree.tree_flatten(output)
    first: dict[int, int] = {}
    places = [first.setdefault(id(leaf), len(first)) for leaf in leaves]
    distinct = [next(leaf for leaf, place in zip(leaves, places, strict=True) if place == k) for k in range(len(first))]

    def rebuild(tensors: Sequence[torch.Tensor]) -> Any:
        return pytree.tree_unflatten([tensors[place] for place in places], tree)

    return distinct, rebuild
