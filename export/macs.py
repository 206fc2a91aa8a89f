"""Multiply-accumulates and parameters of ONNX nodes with static shapes."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

import onnx_ir as ir

CONSTANTS = "constants.safetensors"  # the file of large constants that are no weights


def node_macs(node: ir.Node) -> int:
    """MACs of one node as built, over its whole batch; 0 for what does not multiply matrices."""
    count = _COUNTERS.get(node.op_type)
    return count(node) if count else 0


def parameters_of(graph: ir.Graph, nodes: Iterable[ir.Node] | None = None) -> dict[str, int]:
    """Return the sizes of the weights that nodes read, by name: initializers that lie outside the graph.

    A weight that is first transposed, or otherwise worked on without anything else, counts with who reads the result.
    ``nodes`` None takes all.
    """
    behind: dict[ir.Value, dict[str, int]] = {}  # the weights that a value is made from, where from nothing else
    for value in graph.initializers.values():
        outside = isinstance(value.const_value, ir.ExternalTensor) and value.const_value.location != CONSTANTS
        behind[value] = {value.name or "": prod(_shape(value))} if outside else {}
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


def _shape(value: ir.Value | None) -> tuple[int, ...]:
    return tuple(value.shape.numpy()) if value is not None and value.shape is not None else ()


def _conv(node: ir.Node) -> int:
    return prod(_shape(node.outputs[0])) * prod(_shape(node.inputs[1])[1:])


def _gemm(node: ir.Node) -> int:
    transposed = node.attributes.get_int("transA", 0)
    return prod(_shape(node.outputs[0])) * _shape(node.inputs[0])[0 if transposed else 1]


def _matmul(node: ir.Node) -> int:
    return prod(_shape(node.outputs[0])) * _shape(node.inputs[0])[-1]


def _attention(node: ir.Node) -> int:
    """Count both products of attention; queries are [B, heads, tokens, width] or [B, tokens, heads · width]."""
    query, key, value = (_shape(read) for read in node.inputs[:3])
    if len(query) == 4:
        return query[0] * query[1] * query[2] * key[2] * (query[3] + value[3])
    return query[0] * query[1] * key[1] * (query[2] + value[2])


_COUNTERS = {"Conv": _conv, "Gemm": _gemm, "MatMul": _matmul, "Attention": _attention}
