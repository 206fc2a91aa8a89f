"""Low-rank branches at the linear layers of a graph, with their matrices as inputs (LoRA, Hu et al. 2022).

What a layer computes, W x, becomes W x + (x A) B. The matrices of all layers of one width lie in one input:
``lora.down.N`` ``[layers, N, rank]`` holds the A of layers that take N features, ``lora.up.N`` ``[layers, rank, N]``
the B of those that give N.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from export.onnx.denoiser_graph import PREFIX, DenoiserGraph
from export.plan.launches import MATRICES
from export.records.graphs import BranchRecord

Sizes = Sequence[int | ir.SymbolicDim] | None
_SUFFIX = ".weight"
_POINT = {"strides": 1, "pads": 0, "dilations": 1}  # of a convolution that is a linear layer


def with_branches(denoiser: DenoiserGraph, rank: int) -> DenoiserGraph:
    """Return a denoiser with a branch of ``rank`` at every linear layer, convolutions of 1x1 among them."""
    symbolic, model = denoiser.symbolic.clone(), denoiser.model.clone()
    counts: Counter[str] = Counter()
    branches: dict[str, BranchRecord] = {}
    inputs: dict[str, tuple[int, ir.DataType]] = {}
    for layer, weight, _ in _layers(model.graph):
        if layer in branches or weight.shape is None or weight.dtype is None:
            continue
        give, take = (int(size) for size in weight.shape.numpy()[:2])
        down, up = f"{MATRICES}down.{take}", f"{MATRICES}up.{give}"
        branches[layer] = BranchRecord(layer=layer, down=down, down_place=counts[down], up=up, up_place=counts[up])
        counts.update((down, up))
        inputs |= {down: (take, weight.dtype), up: (give, weight.dtype)}
    for graph in (symbolic.graph, model.graph):
        editor = _Editor(graph, rank, branches)
        for name, (width, dtype) in inputs.items():
            sizes = [counts[name], rank, width] if ".up." in name else [counts[name], width, rank]
            editor.add_input(name, sizes, dtype)
        uses: Counter[str] = Counter()
        for layer, _, node in list(_layers(graph)):
            if layer in branches:
                editor.add(node, branches[layer], f"branch.{layer}.{uses[layer]}")
                uses[layer] += 1
    return replace(
        denoiser, symbolic=symbolic, model=model, rank=rank, branches=tuple(branches.values()), matrices=tuple(inputs)
    )


def _layers(graph: ir.Graph) -> Iterator[tuple[str, ir.Value, ir.Node]]:
    """Yield the linear layers that run: name, weight ``[out, in, …]``, and the node that multiplies by it."""
    for node in graph:
        weight = node.inputs[1] if node.op_type in ("MatMul", "Gemm", "Conv") else None
        if weight is not None and node.op_type == "MatMul":
            source = weight.producer()
            weight = source.inputs[0] if source is not None and source.op_type == "Transpose" else None
        if weight is None or not (weight.name or "").startswith(PREFIX) or not (weight.name or "").endswith(_SUFFIX):
            continue
        if node.op_type == "Gemm" and not node.attributes.get_int("transB", 0):
            continue
        if node.op_type == "Conv" and not _is_linear(node, weight):
            continue
        yield (weight.name or "").removeprefix(PREFIX).removesuffix(_SUFFIX), weight, node


def _is_linear(node: ir.Node, weight: ir.Value) -> bool:
    """Whether a convolution is a linear layer at every cell."""
    if weight.shape is None or list(weight.shape.numpy()[2:]) != [1, 1] or node.attributes.get_int("group", 1) != 1:
        return False
    return all(
        set(node.attributes[name].as_ints()) == {size} for name, size in _POINT.items() if name in node.attributes
    )


class _Editor:
    """Adds inputs and branches to a graph."""

    def __init__(self, graph: ir.Graph, rank: int, branches: dict[str, BranchRecord]) -> None:
        self.graph, self.rank = graph, rank
        self._inputs: dict[str, ir.Value] = {}
        self._constants: dict[str, ir.Value] = {}

    def add_input(self, name: str, sizes: list[int], dtype: ir.DataType) -> None:
        self._inputs[name] = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(sizes))
        self.graph.inputs.append(self._inputs[name])

    def add(self, node: ir.Node, branch: BranchRecord, stem: str) -> None:
        """Add a branch to what ``node`` computes."""
        source, result = node.inputs[0], node.outputs[0]
        assert source is not None
        nodes: list[ir.Node] = []

        def call(op: str, part: str, inputs: list[ir.Value], sizes: Sizes, **attributes: int) -> ir.Value:
            made = ir.node(op, inputs, attributes, name=f"{stem}.{part}")
            value = made.outputs[0]
            value.name, value.type = made.name, result.type
            value.shape = None if sizes is None else ir.Shape(sizes)
            nodes.append(made)
            return value

        def matrix(part: str, name: str, place: int) -> ir.Value:
            value = self._inputs[name]
            sizes = list(value.shape.numpy()[1:]) if value.shape is not None else []
            taken = call("Gather", part, [value, self._constant(f"place.{place}", np.array(place))], sizes, axis=0)
            if node.op_type != "Conv":
                return taken
            turned = call("Transpose", f"{part}.turned", [taken], sizes[::-1])
            shape = [*sizes[::-1], 1, 1]
            target = self._constant(f"sizes.{shape[0]}.{shape[1]}", np.array(shape))
            return call("Reshape", f"{part}.kernel", [turned, target], list(shape))

        down, up = matrix("down", branch.down, branch.down_place), matrix("up", branch.up, branch.up_place)
        sizes = None if result.shape is None else list(result.shape)
        inner = None if sizes is None else [*sizes]
        if inner is not None:
            inner[1 if node.op_type == "Conv" else -1] = self.rank
        product = "Conv" if node.op_type == "Conv" else "MatMul"
        added = call(product, "added", [call(product, "inner", [source, down], inner), up], sizes)
        total = call("Add", "sum", [result, added], sizes)
        if result.is_graph_output():
            total.name, result.name = result.name, f"{stem}.layer"
        result.replace_all_uses_with(total, replace_graph_outputs=True)
        nodes[-1].replace_input_with(0, result)
        self.graph.insert_after(node, nodes)

    def _constant(self, name: str, array: np.ndarray) -> ir.Value:
        name = f"branch.{name}"
        if name not in self._constants:
            tensor = ir.tensor(array.astype(np.int64), name=name)
            value = ir.Value(
                name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor
            )
            self.graph.register_initializer(value)
            self._constants[name] = value
        return self._constants[name]
