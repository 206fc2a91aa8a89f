"""A bundle's graphs with more of their tensors as outputs, in ONNX Runtime without any optimisation."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from benchmarks.debug.differences import Values, quiet
from export.bundle import Bundle

GRAPH, WEIGHTS = "graph.onnx", "weights.bin"
_FLOATS = {
    "tensor(float)": onnx.TensorProto.FLOAT,
    "tensor(float16)": onnx.TensorProto.FLOAT16,
    "tensor(double)": onnx.TensorProto.DOUBLE,
}


def read_graph(path: Path, inputs: Values | None = None) -> onnx.ModelProto:
    """Return a graph with the shapes and types of its layers, its weights left where they lie.

    Sizes that it leaves to the run are those of ``inputs``, if these are given.
    """
    model = onnx.load(path, load_external_data=False)
    for value in model.graph.input if inputs else ():
        for size, actual in zip(value.type.tensor_type.shape.dim, (inputs or {})[value.name].shape, strict=True):
            size.dim_value = actual
    depend = {value.name for value in model.graph.input}
    for node in model.graph.node:
        if depend.intersection(node.input):
            depend.update(node.output)
    names = [name for node in model.graph.node for name in node.output if name in depend and name]
    # ONNX's own inference stops at functions such as GroupNormalization
    outputs = session(with_outputs(model, names), path.parent).get_outputs()
    del model.graph.value_info[:]
    model.graph.value_info.extend(
        onnx.helper.make_tensor_value_info(output.name, _FLOATS[output.type], output.shape)
        for output in outputs
        if output.type in _FLOATS
    )
    return model


def layers_of(model: onnx.ModelProto) -> list[str]:
    """Return the floats that the nodes of a graph of :func:`read_graph` compute of its inputs, in their order.

    Sizes, indices and masks are no layers, nor are weights that are transposed.
    """
    return [value.name for value in model.graph.value_info]


def producers(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """Return the node that computes each tensor."""
    return {name: node for node in model.graph.node for name in node.output if name}


def with_outputs(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """Return a copy whose outputs are these tensors."""
    from polygraphy.backend.onnx import modify_outputs

    with quiet():
        marked: onnx.ModelProto = modify_outputs(model, outputs=list(names), copy=True)
    return marked


def session(model: onnx.ModelProto, folder: Path) -> Any:
    """Return a session on the CPU that runs every node as it stands, its weights read from ``folder``."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


class Reference:
    """All graphs of a bundle as :func:`session`, with the outputs of sites as further outputs."""

    def __init__(self, bundle: Bundle) -> None:
        self._folder = bundle.folder
        self._sessions: dict[str, Any] = {}

    def run(self, file: str, inputs: Values) -> dict[str, np.ndarray]:
        """Return a graph's outputs, and those of the sites inside it under their names (``feature.…``)."""
        if file not in self._sessions:
            model = read_graph(self._folder / file)
            names = [value.name for value in model.graph.output]
            names += [name for name in layers_of(model) if name.startswith("feature.") and name not in names]
            self._sessions[file] = session(with_outputs(model, names), self._folder)
        names = [output.name for output in self._sessions[file].get_outputs()]
        return dict(zip(names, self._sessions[file].run(names, dict(inputs)), strict=True))


def save_alone(path: Path, folder: Path, between: tuple[Collection[str], str] | None = None) -> Path:
    """Write a graph and its weights into a folder of their own, and return its file.

    What it computes of weights alone becomes weights: Polygraphy would make it inputs that nobody has values for.
    ``between`` are names of tensors that are given, and the one to compute from them: of the graph's nodes only those
    that it takes are left.
    """
    model = ir.from_proto(read_graph(path))  # which knows the shape of what becomes an input
    ir.external_data.set_base_dir(model.graph, path.parent)
    if between:
        given, output = between
        inputs = [value.name or "" for value in model.graph.inputs]
        graph = ir.convenience.extract(model.graph, list(dict.fromkeys([*inputs, *given])), [output])
        for value in [value for value in graph.inputs if not value.uses()]:
            graph.inputs.remove(value)
        model = ir.Model(graph, ir_version=model.ir_version)
    _fold(model, path.parent)
    ir.save(model, folder / GRAPH, external_data=WEIGHTS)
    return folder / GRAPH


def _fold(model: ir.Model, folder: Path) -> None:
    """Compute what depends on weights alone."""
    graph, depend = model.graph, set(model.graph.inputs)
    for node in graph:
        if depend.intersection(node.inputs):
            depend.update(node.outputs)
    fixed = [node for node in graph if not depend.intersection(node.outputs)]
    values = [value for node in fixed for value in node.outputs if depend.intersection(_results(value))]
    if not values:
        return
    part = ir.Model(
        ir.convenience.extract(graph, [], [value.name or "" for value in values]), ir_version=model.ir_version
    )
    results = session(ir.to_proto(part), folder).run(None, {})
    for value, array in zip(values, results, strict=True):
        tensor = ir.tensor(array)
        weight = ir.Value(
            name=value.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor
        )
        value.replace_all_uses_with(weight)
        value.name = f"{value.name}.node"
        graph.register_initializer(weight)
    RemoveUnusedNodesPass()(model)


def _results(value: ir.Value) -> list[ir.Value]:
    return [result for node, _ in value.uses() for result in node.outputs]
