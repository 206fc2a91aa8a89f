"""Cut one signature's graph out of the tapped graph.

The outputs of skipped sites become graph inputs, and every node that then feeds nobody goes. Where backups are
learned, a skipped site's output becomes Σ_j coefficient_j · cache_j, computed where it is read.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from export.bundle import CoefficientRecord, TensorRecord
from export.convert import tensor_record
from export.tapped import Tapped, feature_name


@dataclass(frozen=True)
class Cut:
    """A signature's graph, ready to be saved.

    Attributes:
        model: the graph.
        inputs, outputs: its tensors.
        coefficients: which of its inputs carry backup weights, and which.
        caches: which of its inputs carry cached features: ``(site, output, term)`` by input name.
        features: which of its outputs are features to store: ``(site, output)`` by output name.
    """

    model: ir.Model
    inputs: list[TensorRecord]
    outputs: list[TensorRecord]
    coefficients: dict[str, CoefficientRecord]
    caches: dict[str, tuple[int, int, int]]
    features: dict[str, tuple[int, int]]


def cut(
    tapped: Tapped,
    name: str,
    computed: Collection[int],
    stored: Collection[int],
    backups: dict[str, np.ndarray],
    hoisted: Collection[str] = (),
) -> Cut:
    """Cut the graph that computes the sites ``computed`` and hands out the features of the sites ``stored``.

    ``hoisted`` names values that prologues compute (:mod:`export.prologue`): they become inputs.
    ``backups`` holds the SubNet's backup tensors; empty means that a skipped site serves its last output as it is.
    """
    sites = tapped.trace.sites
    served = {
        feature_name(site.name, output): (index, output)
        for index, site in enumerate(sites)
        if index not in computed
        for output in range(len(tapped.trace.outputs[index]))
    }
    features = {
        feature_name(sites[index].name, output): (index, output)
        for index in sorted(stored)
        for output in range(len(tapped.trace.outputs[index]))
    }
    given = ["latent", "timestep", *tapped.condition_names, *hoisted]
    graph = ir.convenience.extract(tapped.model.graph, [*given, *served], ["epsilon", *features])
    graph.name = name
    read = [value for value in graph.inputs if value.uses() or value in graph.outputs]
    graph.inputs.clear()
    graph.inputs.extend(value for value in read if value.name in given)

    coefficients: dict[str, CoefficientRecord] = {}
    caches: dict[str, tuple[int, int, int]] = {}
    for value in read:
        if value.name not in served:
            continue
        index, output = served[value.name]
        key = value.name.removeprefix("feature.")
        weights = backups.get(f"backup.{key}")
        terms = 1 if weights is None else weights.shape[1]
        history = [ir.Value(name=f"cache.{key}.{term}", type=value.type, shape=value.shape) for term in range(terms)]
        graph.inputs.extend(history)
        caches |= {past.name: (index, output, term) for term, past in enumerate(history) if past.name}
        if weights is None:
            value.replace_all_uses_with(history[0], replace_graph_outputs=True)
            continue
        shape = [1] * len(value.shape or ())
        if weights.ndim == 3:
            shape[sites[index].channel_axis] = weights.shape[2]
        factors = [
            ir.Value(name=f"backup.{key}.{term}", type=value.type, shape=ir.Shape(shape)) for term in range(terms)
        ]
        graph.inputs.extend(factors)
        coefficients |= {
            factor.name: CoefficientRecord(tensor=f"backup.{key}", term=term)
            for term, factor in enumerate(factors)
            if factor.name
        }
        _combine(graph, value, history, factors)

    inputs = [tensor_record(value) for value in graph.inputs]
    outputs = [tensor_record(value) for value in graph.outputs]
    model = ir.Model(graph, ir_version=tapped.model.ir_version, producer_name="dipgo")
    return Cut(model, inputs, outputs, coefficients, caches, features)


def _combine(graph: ir.Graph, served: ir.Value, history: list[ir.Value], factors: list[ir.Value]) -> None:
    nodes = []
    total: ir.Value | None = None
    for past, factor in zip(history, factors, strict=True):
        product = ir.node("Mul", [past, factor])
        nodes.append(product)
        if total is None:
            total = product.outputs[0]
        else:
            nodes.append(ir.node("Add", [total, product.outputs[0]]))
            total = nodes[-1].outputs[0]
    assert total is not None
    for number, node in enumerate(nodes):
        node.outputs[0].name = f"{served.name}.backup.{number}"
        node.outputs[0].type, node.outputs[0].shape = served.type, served.shape
    served.replace_all_uses_with(total, replace_graph_outputs=True)
    first = next(iter(graph), None)
    if first is None:
        graph.extend(nodes)
    else:
        graph.insert_before(first, nodes)
