"""Passes on the ONNX IR that mend what converters or runtimes get wrong.

:func:`mend` follows every conversion: it puts right what is no valid ONNX, or what the specification allows and
runtimes do not take. None of it changes what a graph computes.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


def mend(model: ir.Model) -> None:
    """Apply every repair that is right for all runtimes."""
    drop_idle_squeezes(model)
    align_concatenations(model)
    transpose_by_name(model)
    widen_attention_masks(model)


def drop_idle_squeezes(model: ir.Model) -> None:
    """Remove each Squeeze that torch meant to do nothing, which ONNX refuses: of a size other than 1.

    It shows in the ranks that the exporter recorded: the result has the rank of the input.
    """
    for node in list(model.graph):
        if node.op_type != "Squeeze" or len(node.inputs) < 2:
            continue
        source, result = node.inputs[0], node.outputs[0]
        if source is None or source.shape is None or result.shape is None or len(source.shape) != len(result.shape):
            continue
        _bypass(node, source)


def align_concatenations(model: ir.Model) -> None:
    """Cast the inputs of each Concat to the type of its result: torch promotes them, ONNX wants them equal.

    SDXL in half joins its pooled embedding to sinusoidal embeddings, which are float32.
    """
    for node in list(model.graph):
        wanted = node.outputs[0].dtype
        if node.op_type != "Concat" or wanted is None:
            continue
        for position, value in enumerate(node.inputs):
            if value is None or value.dtype in (None, wanted):
                continue
            name = f"{node.name}_cast_{position}"
            cast = ir.node("Cast", [value], {"to": int(wanted)}, name=name)
            result = cast.outputs[0]
            result.name, result.type, result.shape = name, ir.TensorType(wanted), value.shape
            model.graph.insert_before(node, cast)
            node.replace_input_with(position, result)


def transpose_by_name(model: ir.Model) -> None:
    """Turn each Einsum that only reorders axes into a Transpose: ONNX has no Einsum in bfloat16."""
    for node in model.graph:
        if node.op_type != "Einsum" or len(node.inputs) != 1:
            continue
        before, arrow, after = node.attributes["equation"].as_string().replace(" ", "").partition("->")
        if not arrow or not before.isalpha() or len(set(before)) < len(before) or sorted(before) != sorted(after):
            continue
        node.op_type = "Transpose"
        node.attributes.clear()
        node.attributes["perm"] = ir.AttrInt64s("perm", [before.index(axis) for axis in after])


def widen_attention_masks(model: ir.Model) -> None:
    """Give each attention mask that is one row for all queries a row a query: ORT's Attention does not broadcast it."""
    graph = model.graph
    for node in list(graph):
        if node.op_type != "Attention" or len(node.inputs) < 4:
            continue
        query, mask = node.inputs[0], node.inputs[3]
        if query is None or mask is None or mask.shape is None or query.shape is None or len(query.shape) != 4:
            continue
        queries = query.shape[2]
        if len(mask.shape) < 2 or mask.shape[-2] != 1 or not isinstance(queries, int) or queries == 1:
            continue
        sizes = [1] * (len(mask.shape) - 2) + [queries, 1]  # Expand broadcasts both ways
        target = _constant(f"{node.name}_mask_sizes", np.array(sizes, np.int64))
        wide = ir.node("Expand", [mask, target.outputs[0]], name=f"{node.name}_mask")
        wide.outputs[0].name = f"{node.name}_mask"
        wide.outputs[0].type = mask.type
        wide.outputs[0].shape = ir.Shape([*mask.shape[:-2], queries, mask.shape[-1]])
        graph.insert_before(node, [target, wide])
        node.replace_input_with(3, wide.outputs[0])


def drop_idle_arithmetic(model: ir.Model) -> None:
    """Remove each addition of 0 and multiplication by 1: of exactly these, as a constant of one element."""
    idle = {"Add": 0, "Sub": 0, "Mul": 1, "Div": 1}
    for node in list(model.graph):
        neutral = idle.get(node.op_type)
        if neutral is None:
            continue
        result = node.outputs[0]
        for position in (1, 0) if node.op_type in ("Add", "Mul") else (1,):
            constant, other = node.inputs[position], node.inputs[1 - position]
            held = ir.convenience.get_const_tensor(constant) if constant is not None else None
            if other is None or held is None or held.size != 1 or isinstance(held, ir.ExternalTensor):
                continue
            if held.numpy().item() == neutral and other.shape is not None and other.shape == result.shape:
                _bypass(node, other)
                break


def _bypass(node: ir.Node, source: ir.Value) -> None:
    """Let ``source`` stand for the node's output; an output of the graph keeps its name, so it takes an Identity."""
    result = node.outputs[0]
    if not result.is_graph_output():
        result.replace_all_uses_with(source)
        assert node.graph is not None
        node.graph.remove(node, safe=True)
        return
    node.op_type = "Identity"
    node.attributes.clear()
    node.resize_inputs(1)
    node.replace_input_with(0, source)


def _constant(name: str, array: np.ndarray) -> ir.Node:
    node = ir.node("Constant", [], {"value": ir.tensor(array)}, name=name)
    value = node.outputs[0]
    value.name, value.shape = name, ir.Shape(array.shape)
    value.dtype = ir.DataType.from_numpy(array.dtype)
    return node
