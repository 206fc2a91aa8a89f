"""Layouts: how a SubNet's steps become launches of static graphs.

``signature``: one graph for each distinct set of computed sites; few graphs, few launches.
``segment``: the denoiser is cut where gates differ, so that every block lies in exactly one graph; for engines that
copy weights into themselves.
``step``: one graph a step, with everything that is known of the step folded in.

All three compute the same values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256

import numpy as np
import onnx_ir as ir

from export.onnx.symbols import shape_value
from export.plan.cut import Cut
from export.plan.launches import EPSILON
from export.plan.program import Program, Work
from export.plan.segments import by_segment
from export.records.graphs import Size


def by_signature(work: Work, tables: Mapping[str, np.ndarray]) -> Program:
    """One graph a distinct set of computed sites; it hands out what any of its steps stores."""
    stored: dict[frozenset[int], set[int]] = {}
    for step in work.launched:
        stored.setdefault(work.plans[step].computed, set()).update(work.plans[step].stored)
    parts = {}
    for computed, sites in stored.items():
        outputs = [EPSILON, *work.features(sites)]
        parts[computed] = work.cut(work.name("signature", work.signature(computed), outputs), computed, outputs)
    launches = [
        work.launch(parts[work.plans[step].computed], step, [EPSILON, *work.features(work.plans[step].stored)])
        for step in work.launched
    ]
    names = {str(part.model.graph.name): work.signature(computed) for computed, part in parts.items()}
    return Program({str(part.model.graph.name): part for part in parts.values()}, names, launches)


def by_step(work: Work, tables: Mapping[str, np.ndarray]) -> Program:
    """One graph a step, with its rows of the tables as constants."""
    cuts, names, launches = {}, {}, []
    for step in work.launched:
        outputs = [EPSILON, *work.features(work.plans[step].stored)]
        signature = work.signature(work.plans[step].computed)
        rows = sorted((name, sha256(array[step].tobytes()).hexdigest()) for name, array in tables.items())
        name = work.name("step", step, signature, outputs, rows)
        part = _folded(work.cut(name, work.plans[step].computed, outputs), tables, step)
        cuts[name], names[name] = part, signature
        launches.append(work.launch(part, step, outputs))
    return Program(cuts, names, launches)


def _folded(part: Cut, tables: Mapping[str, np.ndarray], step: int) -> Cut:
    """Return the graph with its rows of the tables as initializers instead of inputs."""
    graph = part.model.graph
    for tensor in part.inputs:
        if tensor.name in part.rows:
            value = next(value for value in graph.inputs if value.name == tensor.name)
            assert value.dtype is not None
            rows = 2 if part.rows[tensor.name].by_pass(tables) else 1  # these stand for all
            shape = [size if isinstance(size, int) else rows for size in tensor.shape]
            row = part.rows[tensor.name].read(tables, step, shape).astype(value.dtype.numpy())
            graph.inputs.remove(value)
            if shape != tensor.shape:
                value = _repeated(graph, value, tensor.shape, shape)
            value.const_value = ir.tensor(np.ascontiguousarray(row), dtype=value.dtype, name=value.name)
            graph.register_initializer(value)
    inputs = [tensor for tensor in part.inputs if tensor.name not in part.rows]
    return Cut(part.model, inputs, part.outputs, {}, part.reads)


def _repeated(graph: ir.Graph, value: ir.Value, sizes: Sequence[Size], shape: Sequence[int]) -> ir.Value:
    """Let what reads ``value``, an input no longer, read a value of ``shape`` that is repeated; returns that value.

    Two rows are those of the passes of guidance: each is repeated for the images of its pass.
    """
    rows, rest = shape[0], shape[1:]
    row = ir.Value(name=value.name, type=value.type, shape=ir.Shape(shape))
    result = ir.Value(name=f"{value.name}.repeated", type=value.type, shape=value.shape)
    value.replace_all_uses_with(result, replace_graph_outputs=True)
    target, nodes = shape_value(graph, sizes, f"{result.name}.sizes")
    if rows == 1:
        nodes.append(ir.node("Expand", [row, target], outputs=[result]))
    else:
        apart, more = shape_value(graph, [rows, 1, *rest], f"{result.name}.apart")
        images, those = shape_value(graph, [rows, f"({sizes[0]})/{rows}", *rest], f"{result.name}.images")
        nodes += [*more, *those, (split := ir.node("Reshape", [row, apart]))]
        nodes += [(spread := ir.node("Expand", [split.outputs[0], images]))]
        nodes += [ir.node("Reshape", [spread.outputs[0], target], outputs=[result])]
        for node, what in ((split, "split"), (spread, "spread")):
            node.outputs[0].name, node.outputs[0].type = f"{result.name}.{what}", value.type
    graph.insert_before(next(iter(graph)), nodes)
    return row


Layout = Callable[[Work, Mapping[str, np.ndarray]], Program]
LAYOUTS: dict[str, Layout] = {"signature": by_signature, "segment": by_segment, "step": by_step}
