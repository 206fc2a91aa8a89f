"""The layout ``segment``: the denoiser cut where gates differ, so that every block lies in exactly one graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from export.plan.cut import Cut, cut
from export.plan.launches import EPSILON
from export.plan.program import Program, Work


def by_segment(work: Work, tables: Mapping[str, np.ndarray]) -> Program:
    """Graphs of nodes that run in the same steps; every node, and so every weight, lies in exactly one.

    A node's *column* says under which of the launched signatures it runs. Walking the graph in order, a node's *level*
    counts how often the column changes on the way to it; nodes of one column and one level form a segment. Levels
    rise from segment to segment, so their order is an order of execution.
    """
    denoiser = work.loop.denoiser
    signatures = list(dict.fromkeys(work.plans[step].computed for step in work.launched))
    columns = _columns(work, signatures)
    level: dict[ir.Node, int] = {}
    members: dict[tuple[int, tuple[bool, ...]], list[ir.Node]] = {}
    for node in denoiser.model.graph:
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
        inputs = {
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
        served = {
            name for name in inputs if any(denoiser.site_of.get(name) in work.plans[step].served for step in steps)
        }
        sites = [
            site for site in range(len(denoiser.features)) if by_value.get(denoiser.features[site][0]) in set(nodes)
        ]
        part = cut(
            work.loop, work.name("segment", sorted(inputs), sorted(served), handed), sorted(inputs), served, handed
        )
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
    denoiser = work.loop.denoiser
    live = []
    for computed in signatures:
        stops = {*work.loop.earlier, *work.features(set(range(len(denoiser.features))) - computed)}
        stack = [denoiser.producers[name] for name in [EPSILON, *work.features(computed)] if name not in stops]
        nodes: set[ir.Node] = set()
        while stack:
            node = stack.pop()
            if node not in nodes:
                nodes.add(node)
                stack.extend(
                    producer
                    for value in node.inputs
                    if value is not None and value.name not in stops and (producer := value.producer()) is not None
                )
        live.append(nodes)
    return {
        node: column
        for node in denoiser.model.graph
        if node in denoiser.loop_nodes and any(column := tuple(node in nodes for nodes in live))
    }
