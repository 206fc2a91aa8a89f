"""Multiply-accumulates and parameters of ONNX nodes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod

import onnx_ir as ir

from export.axes import sizes_at
from export.onnx.symbols import sizes_of

CONSTANTS = "constants.safetensors"  # the file of large constants that are no weights


def node_macs(node: ir.Node, values: Mapping[str, int] | None = None) -> int:
    """MACs of one node as built, over its whole batch; 0 for what does not multiply matrices.

    ``values`` are those of the axes at which they are counted.
    """
    count = _COUNTERS.get(node.op_type)
    return count(node, values or {}) if count else 0


def weights_read(graph: ir.Graph, nodes: Iterable[ir.Node] | None = None) -> dict[str, int]:
    """Return the sizes of the weights that nodes read, by name: initializers that lie outside the graph.

    A weight that is first transposed, or otherwise worked on without anything else, counts with who reads the result.
    ``nodes`` None takes all.
    """
    behind: dict[ir.Value, dict[str, int]] = {}  # the weights that a value is made from, where from nothing else
    for value in graph.initializers.values():
        outside = isinstance(value.const_value, ir.ExternalTensor) and value.const_value.location != CONSTANTS
        behind[value] = {value.name or "": prod(_shape(value, {}))} if outside else {}
    for node in graph:
        read = [value for value in node.inputs if value is not None]
        if all(value in behind for value in read):
            weights = {name: size for value in read for name, size in behind[value].items()}
            behind.update(dict.fromkeys(node.outputs, weights))
    chosen = graph if nodes is None else nodes
    return {
        name: size
        for node in chosen
        for value in node.inputs
        if value is not None
        for name, size in behind.get(value, {}).items()
    }


def _shape(value: ir.Value | None, values: Mapping[str, int]) -> tuple[int, ...]:
    return sizes_at(sizes_of(value), values) if value is not None and value.shape is not None else ()


def _conv(node: ir.Node, values: Mapping[str, int]) -> int:
    return prod(_shape(node.outputs[0], values)) * prod(_shape(node.inputs[1], values)[1:])


def _gemm(node: ir.Node, values: Mapping[str, int]) -> int:
    transposed = node.attributes.get_int("transA", 0)
    return prod(_shape(node.outputs[0], values)) * _shape(node.inputs[0], values)[0 if transposed else 1]


def _matmul(node: ir.Node, values: Mapping[str, int]) -> int:
    return prod(_shape(node.outputs[0], values)) * _shape(node.inputs[0], values)[-1]


def _attention(node: ir.Node, values: Mapping[str, int]) -> int:
    """Count both products of attention; queries are [B, heads, tokens, width] or [B, tokens, heads · width]."""
    query, key, value = (_shape(read, values) for read in node.inputs[:3])
    if len(query) == 4:
        return query[0] * query[1] * query[2] * key[2] * (query[3] + value[3])
    return query[0] * query[1] * key[1] * (query[2] + value[2])


_COUNTERS = {"Conv": _conv, "Gemm": _gemm, "MatMul": _matmul, "Attention": _attention}
