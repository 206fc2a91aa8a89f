"""Cut a graph of the loop out of the denoiser.

What other graphs or earlier launches computed becomes an input, and every node that then feeds nobody goes. Where
backups are learned, a skipped site's output becomes Σ_j coefficient_j · cache_j, computed where it is read. A graph
that computes ε also applies the solver.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from export.onnx.convert import tensor_record
from export.onnx.denoiser_graph import DenoiserGraph
from export.onnx.symbols import read_elsewhere
from export.plan.launches import EPSILON, LATENT
from export.records.graphs import RowRecord, TensorRecord

SOLVER = "solver"  # tables of the solver: solver.latents, solver.outputs [calls, p], solver.scale [calls]


@dataclass(frozen=True)
class Loop:
    """What all graphs of a loop have in common.

    Attributes:
        earlier: names of the values that tables and prologues compute before the loop.
        tables: those of them that are tables.
        backups: the SubNet's backup tensors by name; empty where skipped sites serve their last output as it is.
        history: how many past x and ε the solver inside the graphs combines; 0 leaves the solver to the host.
        scaled: whether the sampler scales the denoiser's input.
    """

    denoiser: DenoiserGraph
    earlier: Collection[str]
    tables: Collection[str]
    backups: Mapping[str, np.ndarray]
    history: int
    scaled: bool


@dataclass(frozen=True)
class Cut:
    """A graph, ready to be saved.

    Attributes:
        model: the graph.
        inputs, outputs: its tensors.
        rows: which of its inputs are rows of tables.
        reads: which of its inputs lie in slots: name and term of the value (0 the newest) by input.
    """

    model: ir.Model
    inputs: list[TensorRecord]
    outputs: list[TensorRecord]
    rows: dict[str, RowRecord]
    reads: dict[str, tuple[str, int]]


def cut(loop: Loop, name: str, begin: Collection[str], served: Collection[str], outputs: Sequence[str]) -> Cut:
    """Cut the graph that computes the values ``outputs``, ε among them or not, from the values ``begin``.

    ``served`` are those of ``begin`` that may come from backups: with learned ones they become a weighted sum.
    """
    denoiser = loop.denoiser
    conditions = set(denoiser.given)
    known = dict.fromkeys([LATENT, "timestep", *conditions, *loop.earlier, *begin])
    graph = ir.convenience.extract(denoiser.model.graph, list(known), list(outputs))
    graph.name = name
    read_elsewhere(graph, LATENT)
    values = [value for value in graph.inputs if value.uses() or value.is_graph_output()]
    graph.inputs.clear()
    rows: dict[str, RowRecord] = {}
    reads: dict[str, tuple[str, int]] = {}
    editor = _Editor(graph, rows, reads)
    for value in values:
        key = value.name or ""
        weights = loop.backups.get(key.replace("feature.", "backup.", 1)) if key in served else None
        if key == LATENT:
            editor.add_latent(value, loop.scaled)
        elif key in loop.tables:
            graph.inputs.append(value)
            rows[key] = RowRecord(tensor=key)
        elif weights is not None:
            editor.serve(value, weights, denoiser.channel_axes[key])
        else:
            graph.inputs.append(value)
            if key not in conditions and key not in loop.earlier and key != "timestep":
                reads[key] = (key, 0)
    if EPSILON in outputs and loop.history:
        editor.solve(loop.history)
    return Cut(
        ir.Model(graph, ir_version=denoiser.model.ir_version, producer_name="dipgo"),
        [tensor_record(value) for value in graph.inputs],
        [tensor_record(value) for value in graph.outputs],
        rows,
        reads,
    )


class _Editor:
    """Adds inputs and sums to a graph that was just extracted."""

    def __init__(self, graph: ir.Graph, rows: dict[str, RowRecord], reads: dict[str, tuple[str, int]]) -> None:
        self.graph, self.rows, self.reads = graph, rows, reads

    def add_latent(self, value: ir.Value, scaled: bool) -> None:
        """Make x an input; where the sampler scales it, what reads it reads ``solver.scale`` · x."""
        if not scaled:
            self._input(value, (LATENT, 0))
            return
        state = self._latent(value)
        scale = self._coefficient(f"{SOLVER}.scale", value, f"{SOLVER}.scale", None)
        product = ir.node("Mul", [state, scale])
        self._replace(value, product.outputs[0], [product])

    def serve(self, value: ir.Value, weights: np.ndarray, axis: int) -> None:
        """Put Σ_j coefficient_j · cache_j in the place of a site's output."""
        key = (value.name or "").removeprefix("feature.")
        shape: list[int | ir.SymbolicDim] = [1] * len(value.shape or ())
        if weights.ndim > 2:
            shape[axis] = weights.shape[-1]
        if weights.ndim == 4 and value.shape is not None:
            shape[0] = value.shape[0]  # a row of the batch has the weights of its pass
        terms = []
        for term in range(weights.shape[1]):
            past = ir.Value(name=f"cache.{key}.{term}", type=value.type, shape=value.shape)
            self._input(past, (value.name or "", term))
            tensor = f"backup.{key}"
            terms.append((past, self._coefficient(f"{tensor}.{term}", value, tensor, term, shape)))
        total, nodes = _weighted_sum(terms, f"{value.name}.backup")
        self._replace(value, total, nodes)

    def solve(self, history: int) -> None:
        """Compute the next x as output ``next`` (see :mod:`export.plan.solver`)."""
        epsilon = next(value for value in self.graph.outputs if value.name == EPSILON)
        current = next((value for value in self.graph.inputs if value.name == LATENT), None)
        if current is None:  # ε was served: the graph reads x for the solver alone
            current = self._latent(epsilon)
        terms = []
        for term in range(history):
            for what, newest in ((LATENT, current), (EPSILON, epsilon)):
                past = newest
                if term:
                    past = ir.Value(name=f"{what}.{term}", type=epsilon.type, shape=epsilon.shape)
                    self._input(past, (what, term))
                tensor = f"{SOLVER}.{'latents' if what == LATENT else 'outputs'}"
                terms.append((past, self._coefficient(f"{tensor}.{term}", epsilon, tensor, term)))
        total, nodes = _weighted_sum(terms, "next")
        self.graph.extend(nodes)
        total.name = "next"
        self.graph.outputs.append(total)

    def _latent(self, like: ir.Value) -> ir.Value:
        state = ir.Value(name=LATENT, type=like.type, shape=like.shape)
        self._input(state, (LATENT, 0))
        return state

    def _input(self, value: ir.Value, read: tuple[str, int]) -> None:
        self.graph.inputs.append(value)
        self.reads[value.name or ""] = read

    def _coefficient(
        self, name: str, like: ir.Value, tensor: str, term: int | None, shape: Sequence[int | ir.SymbolicDim] = ()
    ) -> ir.Value:
        shape = shape or [1] * len(like.shape or ())
        factor = ir.Value(name=name, type=like.type, shape=ir.Shape(shape))
        self.graph.inputs.append(factor)
        self.rows[name] = RowRecord(tensor=tensor, term=term)
        return factor

    def _replace(self, value: ir.Value, total: ir.Value, nodes: Sequence[ir.Node]) -> None:
        """Let what reads ``value``, an input no longer, read ``total``, which ``nodes`` compute."""
        for node in nodes:
            node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
        if value.is_graph_output():
            total.name = value.name
        value.replace_all_uses_with(total, replace_graph_outputs=True)
        first = next(iter(self.graph), None)
        if first is None:
            self.graph.extend(nodes)
        else:
            self.graph.insert_before(first, nodes)


def _weighted_sum(terms: Iterable[tuple[ir.Value, ir.Value]], stem: str) -> tuple[ir.Value, list[ir.Node]]:
    """Return Σ value · factor and the nodes that compute it."""
    nodes: list[ir.Node] = []
    total: ir.Value | None = None
    for value, factor in terms:
        product = ir.node("Mul", [value, factor])
        nodes.append(product)
        if total is None:
            total = product.outputs[0]
        else:
            nodes.append(ir.node("Add", [total, product.outputs[0]]))
            total = nodes[-1].outputs[0]
    assert total is not None
    for number, node in enumerate(nodes):
        node.outputs[0].name = f"{stem}.{number}"
        node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
    return total, nodes
