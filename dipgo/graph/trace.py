"""The traced denoiser: one graph with every site's outputs named, from which costs and dependencies are read.

The denoiser is traced once by ``torch.export``. Which nodes a row of gates needs follows from the graph: walk back
from ε and from the outputs of computed sites, and stop at the outputs of skipped ones. That is the paper's "remove
the dependents" (Algorithm 1) without a hand-written topology, and MACs are summed over the nodes that remain.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from dipgo.base.control import PICTURE, STRENGTH
from dipgo.base.errors import DipgoError, UsageError
from dipgo.graph.costs import Costs
from dipgo.graph.exported import Tapped, export_tapped, free_sides, in_dtype, size_multiple
from dipgo.graph.macs import node_macs
from dipgo.graph.sites import Site, site_names
from dipgo.model.families import GuidedDenoiser, with_scale_inputs
from dipgo.model.models import Model


@dataclass(frozen=True, eq=False)
class Trace:
    """A traced denoiser.

    Attributes:
        program: the exported program; its outputs are ε, then every site's outputs in order.
        outputs: for each site, the names of the nodes that are its outputs.
        epsilon: the name of the node that is ε.
        guidance_scale: of the guidance inside the graph.
        dtype: of the weights, the sites' outputs and float conditions; latent, timestep and ε are float32 always.
        latent: its shape, without the batch, at which MACs and shapes are.
        free: whether its height and width stay symbolic in the program; else it is for this shape alone.
        shapes: the shape of every node's tensor at one image, and how much it grows by with each further image.
        inputs: the nodes that each node reads.
        node_macs: MACs of every node, of one row of the denoiser's batch.
    """

    model: Model
    program: ExportedProgram
    sites: tuple[Site, ...]
    outputs: tuple[tuple[str, ...], ...]
    epsilon: str
    guidance_scale: float
    dtype: torch.dtype
    latent: tuple[int, ...]
    free: bool
    shapes: dict[str, tuple[tuple[int, int], ...]]
    inputs: dict[str, tuple[str, ...]]
    node_macs: dict[str, int]

    @property
    def rows(self) -> int:
        """Rows of the denoiser's batch per image, one a pass: 2 with guidance, else 1."""
        return self.model.family.passes(self.guidance_scale)

    def shape(self, node: str, batch: int) -> list[int]:
        """Return the shape of a node's tensor in a call on ``batch`` images."""
        return [first + (batch - 1) * growth for first, growth in self.shapes[node]]

    @cached_property
    def macs(self) -> Costs:
        """What the graph costs in MACs, attention products included."""
        return Costs(self, "MACs", self.node_macs)

    def live_sites(self, row: np.ndarray, stored: Iterable[int] = ()) -> set[int]:
        """Return the sites whose outputs are read in a call under ``row``: by ε, or as ``stored`` by later steps.

        Skipped sites among them are read from their backups; computed sites that are not among them are computed for
        nobody.
        """
        live = self._live(np.asarray(row, bool), stored)
        return {index for index, names in enumerate(self.outputs) if live.intersection(names)}

    def output_sites(self) -> list[int]:
        """Return the sites through which everything passes: skip one, and no other site is read in that step."""
        sites = np.arange(len(self.sites))
        return [site for site in sites.tolist() if self.live_sites(sites != site) == {site}]

    def execution_order(self) -> list[int]:
        """Return the sites in the order in which a call computes them."""
        place = {node.name: number for number, node in enumerate(self.program.graph_module.graph.nodes)}
        return sorted(range(len(self.sites)), key=lambda site: place[self.outputs[site][0]])

    def reads_input(self, row: np.ndarray) -> bool:
        """Whether ε under ``row`` still depends on what changes with the step: latent, timestep, control."""
        conditions = [*self.model.family.example(self.model.config, 1)]
        names = list(self.program.graph_signature.user_inputs)
        placeholders = {*names[:2], *(names[2 + conditions.index(STRENGTH)] for _ in {STRENGTH} & {*conditions})}
        return bool(placeholders & self._live(np.asarray(row, bool), ()))

    def is_silent(self, row: np.ndarray, learned: bool) -> bool:
        """Whether ε under ``row`` is the last ε: it reads neither latent nor timestep, and backups are last outputs."""
        return not learned and not row.any() and not self.reads_input(row)

    def running(self, row: np.ndarray) -> set[str]:
        """Return the nodes that a call under ``row`` runs, so that ε and every computed site have their values."""
        return self._live(row, np.flatnonzero(row)) - self._served(row)

    def freed(self, site: int) -> set[str]:
        """Return the nodes that nobody needs when this site alone is skipped.

        That is what lies inside the module, and what feeds nothing but it: a UNet's transformer takes its resnet along.
        """
        row = np.arange(len(self.sites)) != site
        return self._every_node - self._live(row, np.flatnonzero(row)) | set(self.outputs[site])

    @cached_property
    def _every_node(self) -> set[str]:
        return self._live(np.ones(len(self.sites), bool), range(len(self.sites)))

    def _served(self, row: np.ndarray) -> set[str]:
        return {name for index in np.flatnonzero(~row) for name in self.outputs[index]}

    def _live(self, row: np.ndarray, read: Iterable[int]) -> set[str]:
        """Return the nodes that ε and the sites ``read`` depend on, back to the outputs of skipped sites."""
        stops = self._served(row)
        stack = [self.epsilon, *(name for index in read for name in self.outputs[index])]
        live: set[str] = set()
        while stack:
            name = stack.pop()
            if name not in live:
                live.add(name)
                if name not in stops:
                    stack.extend(self.inputs[name])
        return live


_EXAMPLE_BATCH = 3  # torch.export takes 0 and 1 for constants, and 2 for the two passes of guidance


def trace(
    model: Model,
    sites: str | None,
    guidance_scale: float,
    dtype: torch.dtype = torch.float32,
    size: tuple[int, ...] | None = None,
    open_guidance: bool = False,
) -> Trace:
    """Trace a model's denoiser with the sites that ``sites`` chooses (see :func:`dipgo.graph.sites.site_names`).

    The number of images stays symbolic; no weights are read. In a ``dtype`` of 16 bits the graph computes what
    ``pipe.to(dtype)`` would, but for guidance, which is float32 (see
    :func:`~dipgo.graph.exported.in_dtype`). With ``size``, height and width of the latent, these stay symbolic too, in
    multiples of :func:`~dipgo.graph.exported.size_multiple`; MACs are then those at ``size``. At a ``size`` of other
    sides they are fixed. With ``open_guidance`` the guidance scale is a condition
    (:func:`~dipgo.model.families.with_scale_inputs`), where there is guidance.

    Raises UsageError for bad patterns, for a ``size`` where the denoiser takes its own
    alone, and for a guidance that is not finite, DipgoError where torch.export cannot trace the model.
    """
    if not math.isfinite(guidance_scale):
        raise UsageError(f"--guidance {guidance_scale}: give a finite number")
    model = model.at(guidance_scale)
    denoiser = model.empty_denoiser(dtype)
    names = site_names(denoiser, model.family, sites)
    family = in_dtype(model.family, dtype)
    if open_guidance:
        model, family = (
            replace(model, family=with_scale_inputs(model.family, guidance_scale)),
            with_scale_inputs(family, guidance_scale),
        )
    guided = GuidedDenoiser(denoiser, family, guidance_scale)
    rows = _EXAMPLE_BATCH * guided.passes
    conditions = family.example(model.config, _EXAMPLE_BATCH * (2 if guided.guided else 1))
    latent = torch.zeros(model.latent_shape(_EXAMPLE_BATCH))
    if size is not None:
        if PICTURE in conditions:
            cell = conditions[PICTURE].shape[-1] // latent.shape[-1]
            conditions[PICTURE] = torch.zeros(*conditions[PICTURE].shape[:2], *(cell * side for side in size)).to(dtype)
        latent = latent.new_zeros(*latent.shape[:2], *size)
    images = {0: Dim.AUTO}
    free = size is not None and not any(side % size_multiple(model.config) for side in size)
    sides = free_sides(model, denoiser) if free else {}
    dynamic = (images | sides, images, dict.fromkeys(conditions, images))
    if PICTURE in conditions and sides:
        dynamic[2][PICTURE] = images | {axis: cell * side for axis, side in sides.items()}
    program = export_tapped(Tapped(guided, names), (latent, torch.ones(_EXAMPLE_BATCH), conditions), dynamic)

    spec, results = program.call_spec.out_spec, program.graph_module.graph.output_node().args[0]
    assert spec is not None
    epsilon, taps = pytree.tree_unflatten([node.name for node in results], spec)
    outputs = tuple(tuple(tensors) for tensors in taps)
    nodes = {node.name: node for node in program.graph_module.graph.nodes if node.op != "output"}
    ranks = [nodes[first].meta["val"].ndim for first, *_ in outputs]
    batch = nodes[program.graph_signature.user_inputs[0]].meta["val"].shape[0]
    bare = Trace(
        model=model,
        program=program,
        sites=tuple(Site(name, 0, 0, rank - 1 if rank == 3 else 1) for name, rank in zip(names, ranks, strict=True)),
        outputs=outputs,
        epsilon=epsilon,
        guidance_scale=guidance_scale,
        dtype=dtype,
        latent=tuple(latent.shape[1:]),
        free=free,
        shapes={
            name: tuple(_growth(length, batch) for length in node.meta["val"].shape)
            for name, node in nodes.items()
            if isinstance(node.meta.get("val"), torch.Tensor)
        },
        inputs={name: tuple(source.name for source in node.all_input_nodes) for name, node in nodes.items()},
        node_macs={name: node_macs(node) // rows for name, node in nodes.items()},
    )
    if unfit := _unfit(bare):
        if sites in (None, *model.family.sites) and len(unfit) < len(
            names
        ):  # such as what a last block makes of its text
            fit = ",".join(name for name in names if name not in unfit)
            return trace(model, fit, guidance_scale, dtype, size, open_guidance)
        name, reason = next(iter(unfit.items()))
        raise DipgoError(f"site '{name}' {reason}; leave it out")
    parameters = {name: nodes[name].meta["val"].numel() for name in program.graph_signature.inputs_to_parameters}
    priced = []
    for number, site in enumerate(bare.sites):
        freed = bare.freed(number)
        macs, params = (sum(table.get(name, 0) for name in freed) for table in (bare.node_macs, parameters))
        priced.append(replace(site, macs=macs, params=params))
    return replace(bare, sites=tuple(priced))


def _growth(size: Any, batch: Any) -> tuple[int, int]:
    """Return a size at one image, and what each further image adds (sizes are linear in the number of images)."""
    if not isinstance(size, torch.SymInt):
        return int(size), 0
    if size.node.hint is None:
        raise DipgoError("a tensor in the denoiser is as long as the values of another tell; not supported")
    if not size.node.expr.free_symbols & batch.node.expr.free_symbols:
        return int(size.node.hint), 0
    per_image = int(size.node.hint) // _EXAMPLE_BATCH
    return per_image, per_image


def _unfit(bare: Trace) -> dict[str, str]:
    """Return the sites that cannot be skipped, with the reason: what they hand on is not their own, or nobody's."""
    placeholders = {node.name for node in bare.program.graph_module.graph.nodes if node.op == "placeholder"}
    live = bare.live_sites(np.ones(len(bare.sites), bool))
    owner: dict[str, str] = {}
    unfit = {}
    for number, (site, values) in enumerate(zip(bare.sites, bare.outputs, strict=True)):
        if any(value in placeholders or owner.setdefault(value, site.name) != site.name for value in values):
            unfit[site.name] = "hands on a value that it did not compute"
        elif number not in live:
            unfit[site.name] = "computes what nobody reads"
    return unfit
