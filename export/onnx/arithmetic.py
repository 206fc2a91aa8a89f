"""Arithmetic on sizes: what nodes compute from shapes, on symbols, and the nodes that compute what symbols say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import sympy  # type: ignore[import-untyped]

from dipgo.base.errors import DipgoError
from export.onnx.passes import constant

_MANY = 64  # elements; no shape has as many
_INTEGERS = (ir.DataType.INT64, ir.DataType.INT32)
Reads = dict[sympy.Symbol, tuple[ir.Value, int, sympy.Rational]]
"""Where sizes are read when a graph runs: the value and the dimension that show each, and a factor."""


def evaluate_node(
    node: ir.Node, known: Mapping[ir.Value, np.ndarray], sizes: Callable[[ir.Value], list[sympy.Expr]]
) -> np.ndarray | None:
    """Return what a node computes from shapes alone, an array of expressions; None for all other nodes."""
    if node.op_type == "Shape":
        value = node.inputs[0]
        if value is None or value.shape is None:
            return None
        start, end = (node.attributes[name].as_int() if name in node.attributes else None for name in ("start", "end"))
        return np.array(sizes(value)[start:end], object)
    operation = _OPERATIONS.get(node.op_type)
    read = [value for value in node.inputs if value is not None]
    if operation is None or not any(value in known for value in read):
        return None
    inputs = [known[value] if value in known else small_number(value) for value in read]
    result = None if any(value is None for value in inputs) else operation(node, *inputs)
    return None if result is None else np.asarray(result, object)


def small_number(value: ir.Value | None) -> np.ndarray | None:
    """Return a small constant of whole numbers, else None."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    if tensor is None or isinstance(tensor, ir.ExternalTensor) or tensor.size > _MANY or tensor.dtype not in _INTEGERS:
        return None
    numbers = tensor.numpy()
    return np.array([sympy.Integer(int(number)) for number in numbers.reshape(-1)], object).reshape(numbers.shape)


def whole(array: np.ndarray) -> list[int]:
    return [int(number) for number in np.asarray(array).reshape(-1)]


def _cast(node: ir.Node, value: np.ndarray) -> np.ndarray | None:
    return value if node.attributes["to"].as_int() in {int(kind) for kind in _INTEGERS} else None


def _slice(node: ir.Node, value: np.ndarray, start: np.ndarray, end: np.ndarray, *others: np.ndarray) -> np.ndarray:
    step = whole(others[1])[0] if len(others) > 1 else 1
    return value[whole(start)[0] : whole(end)[0] : step]


def _squeeze(node: ir.Node, value: np.ndarray, axes: np.ndarray | None = None) -> np.ndarray:
    return np.squeeze(value, None if axes is None else tuple(whole(axes)))


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "Identity": lambda node, value: value,
    "Cast": _cast,
    "Reshape": lambda node, value, shape: value.reshape(whole(shape)),
    "Squeeze": _squeeze,
    "Unsqueeze": lambda node, value, axes: np.expand_dims(value, tuple(whole(axes))),
    "Concat": lambda node, *values: np.concatenate(values),
    "Gather": lambda node, value, index: value[np.array(index, int)],
    "Slice": _slice,
    "Add": lambda node, a, b: a + b,
    "Sub": lambda node, a, b: a - b,
    "Mul": lambda node, a, b: a * b,
    "Div": lambda node, a, b: np.frompyfunc(lambda x, y: sympy.floor(sympy.simplify(x / y)), 2, 1)(a, b),
}


class SizeBuilder:
    """Builds the nodes that compute sizes from the shapes of the values that ``reads`` names."""

    def __init__(self, reads: Reads, stem: str) -> None:
        self.reads, self.stem = reads, stem
        self.nodes: list[ir.Node] = []
        self._count = 0

    def build(self, sizes: Sequence[sympy.Expr], one_dimensional: bool) -> ir.Value:
        """Return a value of these sizes ``[n]`` int64, or of a single one without a dimension."""
        if all(not size.free_symbols for size in sizes):
            numbers = np.array(whole(np.array(sizes, object)), np.int64)
            return self._add(constant(self._name(), numbers if one_dimensional else numbers.reshape(())))
        pieces = [self._size(size) for size in sizes]
        joined = pieces[0]
        if len(pieces) > 1:
            joined = self._add(_node("Concat", pieces, self._name(), axis=0))
        if one_dimensional:
            return joined
        return self._add(_node("Squeeze", [joined], self._name()))

    def _size(self, size: sympy.Expr) -> ir.Value:
        """Return ``[1]``: sums of products of axes."""
        numerator, denominator = sympy.fraction(sympy.together(sympy.expand(size)))
        total: ir.Value | None = None
        for term in sympy.Add.make_args(sympy.expand(numerator)):
            product: ir.Value | None = None
            for factor in sympy.Mul.make_args(term):
                base, power = factor.as_base_exp() if factor.free_symbols else (factor, 1)
                for _ in range(int(power)):
                    product = self._both("Mul", product, self._factor(base))
            total = self._both("Add", total, product)
        assert total is not None
        return total if denominator == 1 else self._both("Div", total, self._factor(denominator))

    def _factor(self, base: sympy.Expr) -> ir.Value:
        if not base.free_symbols:
            return self._add(constant(self._name(), np.array([int(base)], np.int64)))
        if base not in self.reads:
            raise DipgoError(f"the size {base} does not follow from the batch and the latent's size")
        source, position, ratio = self.reads[base]
        size = self._add(_node("Shape", [source], self._name(), start=position, end=position + 1))
        if ratio.p != 1:
            size = self._both("Mul", size, self._factor(sympy.Integer(ratio.p)))
        return size if ratio.q == 1 else self._both("Div", size, self._factor(sympy.Integer(ratio.q)))

    def _both(self, op: str, left: ir.Value | None, right: ir.Value | None) -> ir.Value:
        assert right is not None
        return right if left is None else self._add(_node(op, [left, right], self._name()))

    def _add(self, node: ir.Node) -> ir.Value:
        self.nodes.append(node)
        return node.outputs[0]

    def _name(self) -> str:
        self._count += 1
        return f"{self.stem}.{self._count}"


def _node(op: str, inputs: Sequence[ir.Value], name: str, **attributes: int) -> ir.Node:
    node = ir.node(op, list(inputs), attributes, name=name)
    node.outputs[0].name, node.outputs[0].type = name, ir.TensorType(ir.DataType.INT64)
    return node
