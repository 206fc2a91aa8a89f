"""Prologues: graphs that run before the loop, and tables, which are evaluated while compiling.

All are cut out of the same conversion as the loop's graphs, at the number of rows that they run on (see
:mod:`export.plan.hoisting` for what they compute).
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from export.onnx.convert import specialise, tensor_record
from export.onnx.denoiser_graph import DenoiserGraph
from export.onnx.macs import node_macs, weights_read
from export.onnx.symbols import read_elsewhere, scale_batch
from export.plan.hoisting import TIMESTEP, Hoisting
from export.plan.launches import LATENT
from export.records.graphs import PrologueRecord, RowRecord
from export.sizes import Sizes

_ELSEWHERE = "weights"
_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_AT_ONCE = 8  # tables that are evaluated together: what they read is widened to float32, and that is memory


@dataclass(frozen=True)
class Prologue:
    """A prologue's graph and its description."""

    model: ir.Model
    record: PrologueRecord


def cut_prologue(
    denoiser: DenoiserGraph, kind: Literal["steps", "prompt"], names: Sequence[str], hoisting: Hoisting, calls: int
) -> Prologue | None:
    """Cut the prologue that computes ``names``, or None where there is nothing to compute.

    It reads values of earlier binding times as the loop does: tables, and for ``steps`` values of ``prompt``.
    """
    if not names:
        return None
    times = calls if kind == "steps" else 1
    batch = denoiser.sizes.batch
    images = replace(denoiser.sizes, batch=batch * times) if isinstance(batch, int) else denoiser.sizes
    model = _cut(denoiser, names, hoisting.read_by(kind), images)
    graph = model.graph
    if not isinstance(batch, int):
        scale_batch(model, denoiser.sizes.axes, times)
    record = PrologueRecord(
        file="",
        kind=kind,
        macs=sum(node_macs(node, denoiser.best) for node in graph) // (times * denoiser.row_count),
        parameters=sum(weights_read(graph).values()),
        inputs=[tensor_record(value) for value in graph.inputs],
        outputs=[tensor_record(value) for value in graph.outputs],
        rows={
            value.name: RowRecord(tensor=value.name)
            for value in graph.inputs
            if value.name and hoisting.binding.get(value.name) == "table"
        },
    )
    return Prologue(model, record)


def evaluate_tables(denoiser: DenoiserGraph, names: Sequence[str], timesteps: Sequence[float]) -> dict[str, np.ndarray]:
    """Compute values that depend on the timestep alone: ``[calls, …]`` each.

    They are computed in float32 whatever the graph's dtype, and stay so: who reads a row rounds it.
    """
    values: dict[str, np.ndarray] = {}
    for start in range(0, len(names), _AT_ONCE):
        values |= _evaluate(denoiser, names[start : start + _AT_ONCE], timesteps)
    return values


def _evaluate(denoiser: DenoiserGraph, names: Sequence[str], timesteps: Sequence[float]) -> dict[str, np.ndarray]:
    import onnxruntime

    calls = len(timesteps)
    model = _cut(denoiser, names, (), replace(denoiser.sizes, batch=calls))
    weights = _widen(model)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_prepacking", "1")  # with it, weights would be copied
    # Folding constants would read the file below.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    initializers = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in weights.items()}
    for name, value in initializers.items():
        options.add_initializer(name, value)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / _ELSEWHERE).touch()  # must exist, and is not read: the weights are those above
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        proto = ir.to_proto(model).SerializeToString()
        session = onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    rows = np.tile(np.array(timesteps, np.float32), denoiser.trace.rows)  # guidance asks for both passes
    values = session.run(list(names), {"timestep": rows})
    return {name: value[:calls] for name, value in zip(names, values, strict=True)}


def _cut(denoiser: DenoiserGraph, names: Sequence[str], begin: Sequence[str], sizes: Sizes) -> ir.Model:
    """Cut the graph from the values ``begin`` to ``names``, at a number of images.

    In two cuts: equal values become one only when the graph is simplified, so it is then that it is cut at
    ``begin``, by the names that the loop's graph has too.
    """
    # Shapes are read off latent and timestep too, until the number of images is fixed; then those inputs go unused.
    by_row = _timestep_by_row(denoiser.symbolic)
    inputs = list(dict.fromkeys([by_row, TIMESTEP, LATENT, *denoiser.given]))
    graph = ir.convenience.extract(denoiser.symbolic.graph, inputs, list(names))
    model = ir.Model(graph, ir_version=denoiser.model.ir_version, producer_name="dipgo")
    specialise(model, LATENT, sizes.latent)
    RemoveUnusedNodesPass()(model)
    if begin:
        inside = {value.name for node in graph for value in node.outputs}
        graph = ir.convenience.extract(graph, [*inputs, *(name for name in begin if name in inside)], list(names))
        model = ir.Model(graph, ir_version=denoiser.model.ir_version, producer_name="dipgo")
    read_elsewhere(graph, LATENT)
    for unused in [value for value in graph.inputs if not value.uses() and not value.is_graph_output()]:
        graph.inputs.remove(unused)
    for value in graph.inputs:
        if value.name == by_row:
            value.name = TIMESTEP
    return model


def _timestep_by_row(model: ir.Model) -> str:
    """Return the name of the timestep as the denoiser takes it, one per row: with guidance, of both passes."""
    for node in model.graph:
        if node.op_type == "Concat" and all(value is not None and value.name == TIMESTEP for value in node.inputs):
            return str(node.outputs[0].name)
    return TIMESTEP


def _widen(model: ir.Model) -> dict[str, np.ndarray]:
    """Turn a graph into a float32 one; returns the weights that lie outside it, mapped where they need no rounding.

    Types are set anew: the graph shares them with the one that it was cut from.
    """
    weights = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None:
            continue
        array = np.asarray(tensor.numpy())
        if tensor.dtype in _HALF:
            array = array.astype(np.float32)
        if isinstance(tensor, ir.ExternalTensor):
            weights[name] = array
            kind = ir.DataType.from_numpy(array.dtype)
            value.const_value = ir.ExternalTensor(
                _ELSEWHERE, 0, array.nbytes, kind, shape=tensor.shape, name=name, base_dir=""
            )
        else:
            value.const_value = ir.tensor(array, name=name)
        value.type = ir.TensorType(value.const_value.dtype)
    for node in model.graph:
        target = node.attributes.get("to")
        if node.op_type == "Cast" and target is not None and ir.DataType(target.as_int()) in _HALF:
            node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT)
    for value in [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]:
        if value.dtype in _HALF:
            value.type = ir.TensorType(ir.DataType.FLOAT)
    return weights
