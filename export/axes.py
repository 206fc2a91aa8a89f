"""Axes: the sizes of a program that are chosen when it runs, and expressions over them.

A size in a bundle's record is a whole number, or an expression over :attr:`export.bundle.BundleRecord.axes` such as
``2*batch`` or ``height*width//4``. Free of torch.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from math import prod
from typing import Any, Literal

from dipgo.base.errors import DipgoError, UsageError
from export.records.graphs import AxisRecord, Size, TensorRecord

MOST_ELEMENTS = 2**40

_OPERATIONS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


def evaluate(size: Size, values: Mapping[str, int]) -> int:
    """Return a size for values of the axes: whole numbers, names, ``+``, ``-``, ``*``, ``//`` and brackets.

    Raises:
        DipgoError: anything else, or a name without a value.
    """
    if isinstance(size, int):
        return size
    try:
        return _value(_parsed(size), values)
    except (KeyError, SyntaxError, TypeError, ValueError, ZeroDivisionError, RecursionError) as error:
        raise DipgoError(f"'{size[:80]}' is no size over {', '.join(values) or 'no axes'}; export it again") from error


def sizes_at(sizes: Sequence[Size], values: Mapping[str, int]) -> tuple[int, ...]:
    """Return sizes for values of the axes."""
    return tuple(evaluate(size, values) for size in sizes)


def shape_at(shape: Sequence[Size], values: Mapping[str, int]) -> tuple[int, ...]:
    """Return a tensor's shape for values of the axes.

    Raises:
        DipgoError: sizes below 1, or more elements than any machine holds.
    """
    sizes = sizes_at(shape, values)
    if min(sizes, default=1) < 1 or prod(sizes) > MOST_ELEMENTS:
        raise DipgoError(f"{list(shape)} is no shape of a tensor with {dict(values)}; export it again")
    return sizes


def values_at(axes: Mapping[str, AxisRecord], which: Literal["min", "opt", "max"]) -> dict[str, int]:
    """Return the value of each axis at an end of its range, or where it is to be fastest."""
    return {name: int(getattr(axis, which)) for name, axis in axes.items()}


def profile_of(
    tensor: TensorRecord, axes: Mapping[str, AxisRecord]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return a tensor's shapes for an optimisation profile: the smallest, the one to be fastest at, the largest."""
    smallest, best, largest = (shape_at(tensor.shape, values_at(axes, which)) for which in ("min", "opt", "max"))
    return smallest, best, largest


def parse_range(text: str, what: str) -> tuple[int, int | None, int]:
    """Read ``n``, ``min:max`` or ``min:opt:max``; the second is None where it is not given.

    Raises:
        UsageError: anything else; ``what`` names the option.
    """
    parts = text.split(":")
    short = all(part.isascii() and part.isdecimal() and len(part) < 11 for part in parts)
    if not short or not all(0 < int(part) < 2**31 for part in parts) or len(parts) > 3:
        raise UsageError(f"{what} {text}: give a number, min:max or min:opt:max, whole numbers above 0")
    numbers = [int(part) for part in parts]
    if numbers != sorted(numbers):
        raise UsageError(f"{what} {text}: runs backwards; give min:max or min:opt:max")
    return numbers[0], numbers[1] if len(numbers) == 3 else None, numbers[-1]


@lru_cache(maxsize=4096)
def _parsed(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


def _value(node: Any, values: Mapping[str, int]) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.Name):
        return values[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand, values)
    if isinstance(node, ast.BinOp):
        return _OPERATIONS[type(node.op)](_value(node.left, values), _value(node.right, values))
    raise ValueError(type(node).__name__)
