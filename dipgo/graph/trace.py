"""The traced denoiser: one graph with every site's outputs named, from which costs and dependencies are read.

The denoiser is traced once by ``torch.export``. Which nodes a row of gates needs follows from the graph: walk back
from ε and from the outputs of computed sites, and stop at the outputs of skipped ones. That is the paper's "remove
the dependents" (Algorithm 1) without a hand-written topology, and MACs are summed over the nodes that remain.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.fx import Node
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from dipgo.base.errors import DipgoError, UsageError
from dipgo.graph.exported import Tapped, export_tapped, free_sides, in_dtype
from dipgo.graph.sites import Site, site_names
from dipgo.model.families import GuidedDenoiser
from dipgo.model.models import Model


@dataclass(frozen=True, eq=False)
class Trace:
    """A traced denoiser.

    Attributes:
        model: what was traced.
        program: the exported program; its outputs are ε, then every site's outputs in order.
        sites: the sites, with their costs.
        outputs: for each site, the names of the nodes that are its outputs.
        epsilon: the name of the node that is ε.
        guidance_scale: of the guidance inside the graph.
        dtype: of the weights, the sites' outputs and float conditions; latent, timestep and ε are float32 always.
        size: height and width of the latent at which MACs and shapes are.
        free: whether height and width stay symbolic in the program; else it is for ``size`` alone.
        shapes: the shape of every node's tensor at one image, and how much it grows by with each further image.
    """

    model: Model
    program: ExportedProgram
    sites: tuple[Site, ...]
    outputs: tuple[tuple[str, ...], ...]
    epsilon: str
    guidance_scale: float
    dtype: torch.dtype
    size: tuple[int, int]
    free: bool
    shapes: dict[str, tuple[tuple[int, int], ...]]
    _inputs: dict[str, tuple[str, ...]]
    _macs: dict[str, int]

    @property
    def rows(self) -> int:
        """Rows of the denoiser's batch per image: 2 with guidance, else 1."""
        return 2 if self.guidance_scale > 1 else 1

    def shape(self, node: str, batch: int) -> list[int]:
        """Return the shape of a node's tensor in a call on ``batch`` images."""
        return [first + (batch - 1) * growth for first, growth in self.shapes[node]]

    @property
    def full_macs(self) -> int:
        """MACs of one call with every gate 1."""
        return self.macs(np.ones(len(self.sites), bool))

    def macs(self, row: np.ndarray) -> int:
        """MACs of one call under a row of gates, for one row of the denoiser's batch (guidance doubles it)."""
        return self._row_macs(tuple(bool(gate) for gate in row))

    def priced(self) -> Trace:
        """Return the trace with the cost of each site: the MACs and parameters that go when it alone is skipped.

        That is what lies inside the module, and what feeds nothing but it: a UNet's transformer takes its resnet along.
        """
        nodes = {node.name: node for node in self.program.graph_module.graph.nodes}
        parameters = self.program.graph_signature.inputs_to_parameters
        ones = np.ones(len(self.sites), bool)
        whole = self._live(ones, range(len(ones)))
        sites = []
        for index, site in enumerate(self.sites):
            row = ones.copy()
            row[index] = False
            gone = whole - self._live(row, np.flatnonzero(row)) | set(self.outputs[index])
            macs = sum(self._macs[name] for name in gone)
            params = sum(nodes[name].meta["val"].numel() for name in gone if name in parameters)
            sites.append(replace(site, macs=macs, params=params))
        return replace(self, sites=tuple(sites))

    def by_layer(self) -> Trace:
        """Return the same trace with MACs counted from layers, as DiP-GO's figures are: without attention products.

        As in the public code's counter a convolution's bias counts once an output element, a linear layer's once an
        output feature, and a normalisation twice an element (together 0.07 % on SD-1.5).
        """
        nodes = (node for node in self.program.graph_module.graph.nodes if node.name in self._macs)
        return self.with_costs({node.name: self._layer_macs(node) for node in nodes})

    def with_costs(self, costs: Mapping[str, int]) -> Trace:
        """Return the trace with ``costs`` by node in the place of MACs; a node that is not named costs nothing."""
        return replace(self, _macs=dict.fromkeys(self._macs, 0) | dict(costs)).priced()

    def _layer_macs(self, node: Node) -> int:
        target = str(node.target) if node.op == "call_function" else ""
        if "attention" in target:
            return 0
        if "_norm" in target:
            return 2 * prod(self.shape(node.name, 1)) // self.rows
        bias = len(node.args) > 2 and isinstance(node.args[2], Node)
        if bias and "conv" in target:
            return self._macs[node.name] + prod(self.shape(node.name, 1)) // self.rows
        if bias and "linear" in target:
            return self._macs[node.name] + self.shape(node.name, 1)[-1]
        return self._macs[node.name]

    def live_sites(self, row: np.ndarray, wanted: Iterable[int] = ()) -> set[int]:
        """Return the sites whose outputs are read in a call under ``row`` by ε or by the sites ``wanted``.

        Skipped sites among them are read from their backups; computed sites that are not among them are computed for
        nobody.
        """
        live = self._live(np.asarray(row, bool), wanted)
        return {index for index, names in enumerate(self.outputs) if live.intersection(names)}

    def output_sites(self) -> list[int]:
        """Return the sites through which everything passes: skip one, and no other site is read in that step."""
        ones = np.ones(len(self.sites), bool)
        through = []
        for site in range(len(ones)):
            row = ones.copy()
            row[site] = False
            if self.live_sites(row) == {site}:
                through.append(site)
        return through

    def execution_order(self) -> list[int]:
        """Return the sites in the order in which a call computes them."""
        place = {node.name: number for number, node in enumerate(self.program.graph_module.graph.nodes)}
        return sorted(range(len(self.sites)), key=lambda site: place[self.outputs[site][0]])

    def reads_input(self, row: np.ndarray) -> bool:
        """Whether ε under ``row`` still depends on the latent or the timestep."""
        placeholders = set(list(self.program.graph_signature.user_inputs)[:2])
        return bool(placeholders & self._live(np.asarray(row, bool), ()))

    def _live(self, row: np.ndarray, wanted: Iterable[int]) -> set[str]:
        stops = {name for index in np.flatnonzero(~row) for name in self.outputs[index]}
        stack = [self.epsilon, *(name for index in wanted for name in self.outputs[index])]
        live: set[str] = set()
        while stack:
            name = stack.pop()
            if name not in live:
                live.add(name)
                if name not in stops:
                    stack.extend(self._inputs[name])
        return live

    @lru_cache(maxsize=65536)  # noqa: B019 - a trace lives as long as the process that searches with it
    def _row_macs(self, row: tuple[bool, ...]) -> int:
        gates = np.array(row)
        stops = {name for index in np.flatnonzero(~gates) for name in self.outputs[index]}
        live = self._live(gates, np.flatnonzero(gates))
        return sum(self._macs[name] for name in live - stops)


_EXAMPLE_BATCH = 3  # torch.export takes 0 and 1 for constants, and 2 for the two halves of guidance


def trace(
    model: Model,
    sites: str | None,
    guidance_scale: float,
    dtype: torch.dtype = torch.float32,
    size: tuple[int, int] | None = None,
) -> Trace:
    """Trace a model's denoiser with the sites that ``sites`` chooses (see :func:`dipgo.graph.sites.site_names`).

    The number of images stays symbolic; no weights are read. In a ``dtype`` of 16 bits the graph computes what
    ``pipe.to(dtype)`` would, but for guidance, which is float32 (see
    :func:`~dipgo.graph.exported.in_dtype`). With ``size``, height and width of the latent, these stay symbolic too, in
    multiples of :func:`~dipgo.graph.exported.size_multiple`; MACs are then those at ``size``.

    Raises UsageError for bad patterns, for a ``size`` where the denoiser takes its own
    alone, and for a guidance that is not finite, DipgoError where torch.export cannot trace the model.
    """
    if not math.isfinite(guidance_scale):
        raise UsageError(f"--guidance {guidance_scale}: give a finite number")
    denoiser = model.empty_denoiser(dtype)
    names = site_names(denoiser, model.family, sites)
    family = in_dtype(model.family, dtype)
    guided = GuidedDenoiser(denoiser, family, guidance_scale)
    rows = _EXAMPLE_BATCH * (2 if guided.guided else 1)
    conditions = family.example(model.config, rows)
    _, channels, *own = model.latent_shape(_EXAMPLE_BATCH)
    latent = torch.zeros(_EXAMPLE_BATCH, channels, *(size or own))
    images = {0: Dim.AUTO}
    sides = {} if size is None else free_sides(model, denoiser)
    dynamic = (images | sides, images, dict.fromkeys(conditions, images))
    program = export_tapped(Tapped(guided, names), (latent, torch.ones(_EXAMPLE_BATCH), conditions), dynamic)

    results = list(program.graph_module.graph.output_node().args[0])
    epsilon, flat = results[0].name, [node.name for node in results[1:]]
    counts = [len(leaves) for leaves in _output_leaves(program)]
    outputs, position = [], 0
    for count in counts:
        outputs.append(tuple(flat[position : position + count]))
        position += count
    _refuse_shared_outputs(program, names, outputs)

    nodes = {node.name: node for node in program.graph_module.graph.nodes if node.op != "output"}
    macs = {name: _node_macs(node) // rows for name, node in nodes.items()}
    inputs = {name: tuple(source.name for source in node.all_input_nodes) for name, node in nodes.items()}
    ranks = [nodes[first].meta["val"].ndim for first, *_ in outputs]
    bare = tuple(
        Site(name, macs=0, params=0, channel_axis=rank - 1 if rank == 3 else 1)
        for name, rank in zip(names, ranks, strict=True)
    )
    batch = nodes[program.graph_signature.user_inputs[0]].meta["val"].shape[0]
    shapes = {
        name: tuple(_growth(length, batch) for length in node.meta["val"].shape)
        for name, node in nodes.items()
        if isinstance(node.meta.get("val"), torch.Tensor)
    }
    where, free = (latent.shape[2], latent.shape[3]), size is not None
    told = (tuple(outputs), epsilon, guidance_scale, dtype, where, free, shapes)
    return Trace(model, program, bare, *told, inputs, macs).priced()


def _hint(size: Any) -> Any:
    """Return a symbolic size as it is in the example, anything else as it is."""
    return size.node.hint if isinstance(size, torch.SymInt) else size


def _growth(size: Any, batch: Any) -> tuple[int, int]:
    """Return a size at one image, and what each further image adds (sizes are linear in the number of images)."""
    if not isinstance(size, torch.SymInt):
        return int(size), 0
    if not size.node.expr.free_symbols & batch.node.expr.free_symbols:
        return int(size.node.hint), 0
    per_image = int(size.node.hint) // _EXAMPLE_BATCH
    return per_image, per_image


def call_macs(model: Model, denoiser: nn.Module) -> int:
    """MACs of one call of the whole denoiser, counted without a trace: quicker, where sites do not matter."""
    example = model.family.example(model.config, 1)
    blank = {name: value.to("meta") for name, value in example.items()}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        latent = torch.empty(model.latent_shape(1), device="meta")
        model.family.call(denoiser.to("meta"), latent, torch.ones(1, device="meta"), blank)
    return counter.get_total_flops() // 2


def _output_leaves(program: ExportedProgram) -> list[list[int]]:
    """Return the structure of the taps: for each site, one entry an output."""
    spec = program.call_spec.out_spec
    assert spec is not None
    leaves = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    return list(leaves[1])


def _refuse_shared_outputs(program: ExportedProgram, names: Sequence[str], outputs: list[tuple[str, ...]]) -> None:
    placeholders = {node.name for node in program.graph_module.graph.nodes if node.op == "placeholder"}
    owner: dict[str, str] = {}
    for site, values in zip(names, outputs, strict=True):
        for value in set(values):
            other = owner.setdefault(value, site)
            if value in placeholders or other != site:
                raise DipgoError(f"site '{site}' hands on a value that it did not compute; leave it out")


def _node_macs(node: Node) -> int:
    """Count one node by torch's own flop counter, on the meta device: there attention is two counted products."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return 0

    def blank(value: Any) -> Any:
        held = value.meta.get("val") if isinstance(value, Node) else value
        if isinstance(held, torch.Tensor):
            return torch.empty([_hint(size) for size in held.shape], dtype=held.dtype, device="meta")
        return _hint(held)

    args, kwargs = pytree.tree_map_only(Node, blank, (node.args, node.kwargs))
    if not _may_multiply(node):
        return 0
    with FlopCounterMode(display=False) as counter:
        node.target(*args, **kwargs)
    return counter.get_total_flops() // 2


_PRODUCTS = ("conv", "linear", "mm", "matmul", "einsum", "attention", "addmv", "bilinear")


def _may_multiply(node: Node) -> bool:
    return any(part in str(node.target) for part in _PRODUCTS)
