"""Passes on the ONNX IR that mend what converters or runtimes get wrong.

:data:`MEND` follows every conversion: it puts right what is no valid ONNX, or what the specification allows and
runtimes do not take. None of it changes what a graph computes, and none of it reads a weight.
"""

from __future__ import annotations

import abc
from typing import Any

import numpy as np
import onnx_ir as ir

_SMALL = 1024  # elements
_NEUTRAL = {"Add": 0, "Sub": 0, "Mul": 1, "Div": 1}


class NodePass(ir.passes.InPlacePass):
    """A pass that looks at each node of the main graph once."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        changes = [self.change(node) for node in list(model.graph)]
        return ir.passes.PassResult(model, any(changes))

    @abc.abstractmethod
    def change(self, node: ir.Node) -> bool:
        """Change what is wrong with a node, and return whether anything was."""


class DropIdleSqueezes(NodePass):
    """Remove each Squeeze that torch meant to do nothing, which ONNX refuses: of a size other than 1.

    It shows in the ranks that the exporter recorded: the result has the rank of the input.
    """

    def change(self, node: ir.Node) -> bool:
        if node.op_type != "Squeeze" or len(node.inputs) < 2:
            return False
        source, result = node.inputs[0], node.outputs[0]
        if source is None or source.shape is None or result.shape is None or len(source.shape) != len(result.shape):
            return False
        _bypass(node, source)
        return True


class AlignConcatenations(NodePass):
    """Cast the inputs of each Concat to the type of its result: torch promotes them, ONNX wants them equal.

    SDXL in half joins its pooled embedding to sinusoidal embeddings, which are float32.
    """

    def change(self, node: ir.Node) -> bool:
        dtype = node.outputs[0].dtype
        if node.op_type != "Concat" or dtype is None:
            return False
        others = {k: value for k, value in enumerate(node.inputs) if value and value.dtype not in (None, dtype)}
        for position, value in others.items():
            name = f"{node.name}_cast_{position}"
            cast = ir.node("Cast", [value], {"to": int(dtype)}, name=name)
            result = cast.outputs[0]
            result.name, result.type, result.shape = name, ir.TensorType(dtype), value.shape
            _graph(node).insert_before(node, cast)
            node.replace_input_with(position, result)
        return bool(others)


class TransposeByName(NodePass):
    """Turn each Einsum that only reorders axes into a Transpose: ONNX has no Einsum in bfloat16."""

    def change(self, node: ir.Node) -> bool:
        if node.op_type != "Einsum" or len(node.inputs) != 1:
            return False
        before, arrow, after = node.attributes["equation"].as_string().replace(" ", "").partition("->")
        if not arrow or not before.isalpha() or len(set(before)) < len(before) or sorted(before) != sorted(after):
            return False
        node.op_type = "Transpose"
        node.attributes.clear()
        node.attributes["perm"] = ir.AttrInt64s("perm", [before.index(axis) for axis in after])
        return True


class WidenAttentionMasks(NodePass):
    """Give each attention mask that is one row for all queries a row a query: ORT's Attention does not broadcast it."""

    def change(self, node: ir.Node) -> bool:
        if node.op_type != "Attention" or len(node.inputs) < 4:
            return False
        query, mask = node.inputs[0], node.inputs[3]
        if query is None or mask is None or mask.shape is None or query.shape is None or len(query.shape) != 4:
            return False
        queries = query.shape[2]
        if len(mask.shape) < 2 or mask.shape[-2] != 1 or not isinstance(queries, int) or queries == 1:
            return False
        sizes = [1] * (len(mask.shape) - 2) + [queries, 1]  # Expand broadcasts both ways
        target = constant(f"{node.name}_mask_sizes", np.array(sizes, np.int64))
        wide = ir.node("Expand", [mask, target.outputs[0]], name=f"{node.name}_mask")
        wide.outputs[0].name = f"{node.name}_mask"
        wide.outputs[0].type = mask.type
        wide.outputs[0].shape = ir.Shape([*mask.shape[:-2], queries, mask.shape[-1]])
        _graph(node).insert_before(node, [target, wide])
        node.replace_input_with(3, wide.outputs[0])
        return True


class ChooseByLogic(NodePass):
    """Write each Where on booleans as (c and a) or (not c and b): ORT has none."""

    def change(self, node: ir.Node) -> bool:
        if node.op_type != "Where" or node.outputs[0].dtype != ir.DataType.BOOL:
            return False
        condition, first, second = node.inputs
        other = ir.node("Not", [condition], name=f"{node.name}_not")
        parts = [
            ir.node("And", [condition, first], name=f"{node.name}_first"),
            ir.node("And", [other.outputs[0], second], name=f"{node.name}_second"),
        ]
        for made in (other, *parts):
            made.outputs[0].name, made.outputs[0].type = made.name, ir.TensorType(ir.DataType.BOOL)
        _graph(node).insert_before(node, [other, *parts])
        node.op_type = "Or"
        node.resize_inputs(2)
        for position, part in enumerate(parts):
            node.replace_input_with(position, part.outputs[0])
        return True


class DropIdleArithmetic(NodePass):
    """Remove each addition of 0 and multiplication by 1: of exactly these, as a constant of one element."""

    def change(self, node: ir.Node) -> bool:
        neutral, result = _NEUTRAL.get(node.op_type), node.outputs[0]
        if neutral is None:
            return False
        for position in (1, 0) if node.op_type in ("Add", "Mul") else (1,):
            constant, other = node.inputs[position], node.inputs[1 - position]
            tensor = ir.convenience.get_const_tensor(constant) if constant is not None else None
            if other is None or tensor is None or tensor.size != 1 or isinstance(tensor, ir.ExternalTensor):
                continue
            if tensor.numpy().item() == neutral and other.shape is not None and other.shape == result.shape:
                _bypass(node, other)
                return True
        return False


class MergeConstants(ir.passes.InPlacePass):
    """Keep one of each small constant that the graph itself holds.

    Unlike ``onnx_ir``'s pass it leaves weights outside the graph alone: their values must not decide its form.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        initializers, count = model.graph.initializers, len(model.graph.initializers)
        first: dict[tuple[Any, ...], ir.Value] = {}
        for name, value in list(initializers.items()):
            tensor = value.const_value
            if tensor is None or isinstance(tensor, ir.ExternalTensor) or tensor.size > _SMALL:
                continue
            if value.is_graph_output():
                continue
            same = first.setdefault((tensor.dtype, tuple(tensor.shape.numpy()), tensor.tobytes()), value)
            if same is not value:
                value.replace_all_uses_with(same)
                del initializers[name]
        return ir.passes.PassResult(model, len(initializers) < count)


MEND = ir.passes.Sequential(
    DropIdleSqueezes(), AlignConcatenations(), TransposeByName(), WidenAttentionMasks(), ChooseByLogic()
)
"""Every repair that is right for all runtimes."""


def _graph(node: ir.Node) -> ir.Graph:
    assert isinstance(node.graph, ir.Graph)
    return node.graph


def _bypass(node: ir.Node, source: ir.Value) -> None:
    """Let ``source`` stand for the node's output; an output of the graph keeps its name, so it takes an Identity."""
    result = node.outputs[0]
    if not result.is_graph_output():
        result.replace_all_uses_with(source)
        _graph(node).remove(node, safe=True)
        return
    node.op_type = "Identity"
    node.attributes.clear()
    node.resize_inputs(1)
    node.replace_input_with(0, source)


def constant(name: str, array: np.ndarray) -> ir.Node:
    """Return a node that holds an array, and its output of the same name."""
    node = ir.node("Constant", [], {"value": ir.tensor(array)}, name=name)
    value = node.outputs[0]
    value.name, value.shape = name, ir.Shape(array.shape)
    value.type = ir.TensorType(ir.DataType.from_numpy(array.dtype))
    return node
