"""Layouts: how a SubNet's steps become launches of static graphs.

``signature``: one graph for each distinct set of computed sites; few graphs, few launches.
``segment``: the denoiser is cut where gates differ, so that every block lies in exactly one graph; for engines that
copy weights into themselves.
``step``: one graph a step, with everything that is known of the step folded in.

All three compute the same values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import onnx_ir as ir

from dipgo.base.files import sha256_of_json
from dipgo.graph.liveness import StepPlan
from export.bundle import Size
from export.onnx.symbols import shape_value
from export.plan.cut import Cut, Loop, cut
from export.plan.launches import EPSILON, LATENT, Launch, Value


@dataclass(frozen=True)
class Work:
    """What a layout is made from.

    Attributes:
        loop: the denoiser, backups and solver.
        plans: of every step.
        launched: the steps that compute ε, ascending; the others have the ε of the one before.
        stem: how graphs' names begin (the model).
        ending: how they end (dtype and shape).
    """

    loop: Loop
    plans: Sequence[StepPlan]
    launched: Sequence[int]
    stem: str
    ending: str

    def features(self, sites: Iterable[int]) -> list[str]:
        """Return the values that are the outputs of ``sites``."""
        return [name for site in sorted(sites) for name in self.loop.tapped.features[site]]

    def signature(self, computed: Iterable[int]) -> str:
        chosen = set(computed)
        return "".join("1" if site in chosen else "0" for site in range(len(self.loop.tapped.features)))

    def name(self, *facts: object) -> str:
        """Return a graph's name: unique and stable, with a digest of everything that its content follows from."""
        loop = self.loop
        widths = {key: list(array.shape[1:]) for key, array in loop.backups.items()}
        key = sha256_of_json([*facts, widths, loop.history, loop.scaled])[:8]
        return f"{self.stem}-{key}-{self.ending}"

    def cut(self, name: str, computed: Iterable[int], wanted: Sequence[str]) -> Cut:
        """Cut the graph of a whole step that computes some sites and serves the others."""
        chosen = set(computed)
        served = self.features(site for site in range(len(self.loop.tapped.features)) if site not in chosen)
        return cut(self.loop, name, served, served, wanted)

    def launch(self, part: Cut, step: int, writes: Iterable[str]) -> Launch:
        """Return the launch of a graph at a step: which values its inputs and outputs are."""
        written = {name: (name, step) for name in writes}
        if "next" in {tensor.name for tensor in part.outputs}:
            written["next"] = (LATENT, self._after(step))
        reads = {name: self._source(value, term, step) for name, (value, term) in part.reads.items()}
        return Launch(step, str(part.model.graph.name), reads, written)

    def _after(self, step: int) -> int:
        """Return the next step that is launched, or the one after the last."""
        return next((later for later in self.launched if later > step), len(self.plans))

    def _source(self, value: str, term: int, step: int) -> Value:
        """Return where an input's value comes from. What is not there yet has coefficient 0: anything will do."""
        if value in (LATENT, EPSILON):
            if not self.loop.history:
                return LATENT, 0  # the host writes every x into one slot
            place = self.launched.index(step) - term
            return (value, self.launched[place]) if place >= 0 else (LATENT, step)
        site = self.loop.tapped.site_of.get(value)
        if site is None or site not in self.plans[step].served:
            return value, step
        sources = self.plans[step].served[site]
        return value, sources[min(term, len(sources) - 1)]


@dataclass(frozen=True)
class Program:
    """Graphs by name, the signature of each, and the launches in order."""

    cuts: dict[str, Cut]
    signatures: dict[str, str]
    launches: list[Launch]


def by_signature(work: Work, tables: Mapping[str, np.ndarray]) -> Program:
    """One graph a distinct set of computed sites; it hands out what any of its steps stores."""
    stored: dict[frozenset[int], set[int]] = {}
    for step in work.launched:
        stored.setdefault(work.plans[step].computed, set()).update(work.plans[step].stored)
    parts = {}
    for computed, kept in stored.items():
        wanted = [EPSILON, *work.features(kept)]
        parts[computed] = work.cut(work.name("signature", work.signature(computed), wanted), computed, wanted)
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
        wanted = [EPSILON, *work.features(work.plans[step].stored)]
        signature = work.signature(work.plans[step].computed)
        rows = sorted((name, sha256(array[step].tobytes()).hexdigest()) for name, array in tables.items())
        name = work.name("step", step, signature, wanted, rows)
        part = _folded(work.cut(name, work.plans[step].computed, wanted), tables, step)
        cuts[name], names[name] = part, signature
        launches.append(work.launch(part, step, wanted))
    return Program(cuts, names, launches)


def _folded(part: Cut, tables: Mapping[str, np.ndarray], step: int) -> Cut:
    """Return the graph with its rows of the tables as initializers instead of inputs."""
    graph = part.model.graph
    for tensor in part.inputs:
        if tensor.name in part.rows:
            value = next(value for value in graph.inputs if value.name == tensor.name)
            assert value.dtype is not None
            rows = 2 if part.rows[tensor.name].by_half(tables) else 1  # these stand for all
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

    Two rows are those of the halves of guidance: each is repeated for the images of its half.
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


def by_segment(work: Work, tables: Mapping[str, np.ndarray]) -> Program:
    """Graphs of nodes that run in the same steps; every node, and so every weight, lies in exactly one.

    A node's *column* says under which of the launched signatures it runs. Walking the graph in order, a node's *level*
    counts how often the column changes on the way to it; nodes of one column and one level form a segment. Levels
    rise from segment to segment, so their order is an order of execution.
    """
    tapped = work.loop.tapped
    signatures = list(dict.fromkeys(work.plans[step].computed for step in work.launched))
    columns = _columns(work, signatures)
    level: dict[ir.Node, int] = {}
    members: dict[tuple[int, tuple[bool, ...]], list[ir.Node]] = {}
    for node in tapped.model.graph:
        if node not in columns:
            continue
        producers = [value.producer() for value in node.inputs if value is not None]
        own = columns[node]
        level[node] = max(
            (level[before] + (columns[before] != own) for before in producers if before in level), default=0
        )
        members.setdefault((level[node], own), []).append(node)

    segment_of = {node: key for key, nodes in members.items() for node in nodes}
    by_value = {value.name: node for node in columns for value in node.outputs}
    stored = set(work.features({site for step in work.launched for site in work.plans[step].stored}))
    parts: dict[tuple[int, tuple[bool, ...]], Cut] = {}
    signature: dict[str, str] = {}
    for key, nodes in sorted(members.items(), key=lambda item: item[0][0]):
        taken = {
            value.name or ""
            for node in nodes
            for value in node.inputs
            if value is not None and value.name in by_value and segment_of[by_value[value.name]] != key
        }
        handed = [
            value.name or ""
            for node in nodes
            for value in node.outputs
            if value.name in stored
            or value.name == EPSILON
            or any(use.node in segment_of and segment_of[use.node] != key for use in value.uses())
        ]
        steps = [step for step in work.launched if key[1][signatures.index(work.plans[step].computed)]]
        served = {name for name in taken if any(tapped.site_of.get(name) in work.plans[step].served for step in steps)}
        sites = [site for site in range(len(tapped.features)) if by_value.get(tapped.features[site][0]) in set(nodes)]
        part = cut(work.loop, work.name("segment", sorted(taken), sorted(served), handed), taken, served, handed)
        parts[key] = part
        signature[str(part.model.graph.name)] = work.signature(sites)

    launches = []
    for step in work.launched:
        place = signatures.index(work.plans[step].computed)
        for key in sorted(parts, key=lambda key: key[0]):
            if key[1][place]:
                launches.append(work.launch(parts[key], step, [tensor.name for tensor in parts[key].outputs]))
    return Program({str(part.model.graph.name): part for part in parts.values()}, signature, launches)


def _columns(work: Work, signatures: Sequence[frozenset[int]]) -> dict[ir.Node, tuple[bool, ...]]:
    """Return for each node of the loop under which signatures it runs; nodes that never run are left out."""
    tapped = work.loop.tapped
    live = []
    for computed in signatures:
        stops = {*work.loop.hoisted, *work.features(set(range(len(tapped.features))) - computed)}
        stack = [tapped.producers[name] for name in [EPSILON, *work.features(computed)] if name not in stops]
        seen: set[ir.Node] = set()
        while stack:
            node = stack.pop()
            if node not in seen:
                seen.add(node)
                stack.extend(
                    producer
                    for value in node.inputs
                    if value is not None and value.name not in stops and (producer := value.producer()) is not None
                )
        live.append(seen)
    return {
        node: column
        for node in tapped.model.graph
        if node in tapped.loop_nodes and any(column := tuple(node in seen for seen in live))
    }


Layout = Callable[[Work, Mapping[str, np.ndarray]], Program]
LAYOUTS: dict[str, Layout] = {"signature": by_signature, "segment": by_segment, "step": by_step}
