"""Binding times: when each value of the denoiser can be computed, and what the loop therefore need not.

A value that depends on the timestep alone (timestep embeddings, their projections) is computed while compiling and
becomes a *table*. One that depends on the prompt or class alone (cross-attention's keys and values, label and text
projections) is computed once a *prompt*. One that depends on both (adaLN modulation) is computed before the loop for
all *steps* in one batch. What depends on the latent is the *loop*. A request's adapters are no time of their own; a
value of them and the timestep is no table any more, but one of the *steps*.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from dipgo.base.control import STRENGTH
from export.onnx.macs import node_macs, weights_read
from export.plan.launches import LATENT, MATRICES
from export.records.graphs import Size
from export.records.program import PartRecord

Binding = Literal["constant", "table", "prompt", "steps", "loop"]
TIMESTEP = "timestep"


def binding_of(sources: Iterable[str]) -> Binding:
    """Return the binding time of a value from the names of the denoiser's inputs that it depends on."""
    every = set(sources)
    names = {name for name in every if not name.startswith(MATRICES)}
    if names & {LATENT, STRENGTH}:  # which change from step to step
        return "loop"
    if not names:
        return "constant"
    if every == {TIMESTEP}:
        return "table"
    return "steps" if TIMESTEP in names else "prompt"


@dataclass(frozen=True)
class Hoisting:
    """What is computed before it is read: the binding time of each value by name, and who reads it.

    ``readers`` holds the binding times of the nodes that read the value.
    """

    binding: Mapping[str, Binding]
    readers: Mapping[str, frozenset[Binding]]

    def read_by(self, reader: Binding) -> list[str]:
        """Return the values that nodes of a binding time take from earlier ones."""
        return [name for name in self.binding if reader in self.readers[name]]


def hoist(graph: ir.Graph, known: Iterable[str], rows: Iterable[Size]) -> Hoisting:
    """Return the values that nodes read from an earlier binding time than their own.

    Args:
        graph: the denoiser at the bundle's sizes, whose inputs are latent, timestep and conditions.
        known: names that may be handed on: those that the graph for any number of images has too.
        rows: the lengths of a batch; only values with a row an image (or a half of one) can be handed on, the rest
            (shapes, mostly) is computed anew where it is read.
    """
    known, rows = set(known), set(rows)
    sources = sources_of(graph)
    binding: dict[str, Binding] = {}
    readers: dict[str, set[Binding]] = {}
    for node in graph:
        own = binding_of(sources[node.outputs[0]])
        for value in node.inputs:
            if value is None or value.name is None or value.producer() is None:
                continue
            theirs = binding_of(sources.get(value, ()))
            by_row = value.shape is not None and len(value.shape) > 0 and _first(value.shape) in rows
            if theirs in (own, "constant") or value.name not in known or not by_row:
                continue
            binding[value.name] = theirs
            readers.setdefault(value.name, set()).add(own)
    return Hoisting(binding, {name: frozenset(times) for name, times in readers.items()})


def _first(shape: ir.Shape) -> Size | None:
    size = shape[0]
    return size if isinstance(size, int) else size.value


def sources_of(graph: ir.Graph) -> dict[ir.Value, frozenset[str]]:
    """Return the names of the graph's inputs whose values each value depends on; shapes are no values."""
    sources: dict[ir.Value, frozenset[str]] = {value: frozenset([value.name or ""]) for value in graph.inputs}
    for node in graph:
        inputs = [value for value in node.inputs if value is not None and node.op_type != "Shape"]
        read = frozenset[str]().union(*(sources.get(value, frozenset()) for value in inputs))
        sources.update(dict.fromkeys(node.outputs, read))
    return sources


def parts(graph: ir.Graph, rows: int, loop: int, calls: int, values: Mapping[str, int]) -> list[PartRecord]:
    """Return parameters and MACs by binding time, of one trajectory of one row.

    Args:
        graph: the whole denoiser at the bundle's sizes.
        rows: of its batch.
        loop: MACs of all launches of the loop.
        calls: of the denoiser in a trajectory. What leaves the loop costs a call's worth (``prompt``), all calls' worth
            (``steps``), or is paid while compiling (``table``).
        values: of the axes, where MACs are counted.

    A parameter that several binding times read counts with the latest.
    """
    order: tuple[Binding, ...] = ("table", "prompt", "steps", "loop")
    sources = sources_of(graph)
    nodes: dict[Binding, list[ir.Node]] = {part: [] for part in order}
    for node in graph:
        own = binding_of(sources[node.outputs[0]])
        if own != "constant":
            nodes[own].append(node)
    counted: set[str] = set()
    counts = []
    for part in reversed(order):
        parameters = {name: size for name, size in weights_read(graph, nodes[part]).items() if name not in counted}
        counted |= parameters.keys()
        counts.append((part, sum(parameters.values()), sum(node_macs(node, values) for node in nodes[part]) // rows))
    times = {"table": calls, "prompt": 1, "steps": calls}
    return [
        PartRecord(part=part, parameters=size, macs=loop if part == "loop" else own * times[part])
        for part, size, own in reversed(counts)
    ]
