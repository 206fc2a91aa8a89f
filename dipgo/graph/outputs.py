"""What a module hands out, as the tensors that are cached of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

Rebuild = Callable[[Sequence[torch.Tensor]], Any]


def take_apart(output: Any) -> tuple[list[torch.Tensor], Rebuild]:
    """Return the distinct tensors in a module's output, and how to put others in their places; None stays where it is.

    A tensor that stands in the output twice counts once: a UNet's down block hands out its last hidden state also as
    a skip connection.
    """
    every, tree = pytree.tree_flatten(output)
    leaves = [leaf for leaf in every if leaf is not None]  # SD3's last block has no text to hand on
    first: dict[int, int] = {}
    places = [first.setdefault(id(leaf), len(first)) for leaf in leaves]
    empty = [None if leaf is None else 0 for leaf in every]
    distinct = [next(leaf for leaf, place in zip(leaves, places, strict=True) if place == k) for k in range(len(first))]

    def rebuild(tensors: Sequence[torch.Tensor]) -> Any:
        put = iter(places)
        return pytree.tree_unflatten([None if leaf is None else tensors[next(put)] for leaf in empty], tree)

    return distinct, rebuild
