"""The traced denoiser as ONNX: one graph with every site's outputs named, its weights pointing into their files.

Converted once per model; :mod:`export.plan.cut` makes each graph of a program out of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import onnx_ir as ir

from dipgo.graph.trace import Trace
from export.axes import values_at
from export.onnx.cache import cached, digest_of_program
from export.onnx.convert import convert, specialise
from export.onnx.weights import Weights, bind
from export.plan.hoisting import binding_of, sources_of
from export.plan.launches import EPSILON, LATENT
from export.records.graphs import BranchRecord, Size
from export.sizes import Sizes

PREFIX = "guided.denoiser."


@dataclass(frozen=True)
class DenoiserGraph:
    """The whole denoiser in ONNX.

    Attributes:
        sizes: of ``model``: images a call, and the latent's sides.
        symbolic: the graph as converted, for any number of images.
        model: the graph at ``sizes``, optimised; outputs are ``epsilon`` and every site's :attr:`features`.
        condition_names: the graph inputs that carry the conditions.
        features: the names of each site's outputs, see :func:`feature_name`.
        rank: of low-rank branches; 0 where there are none (see :mod:`export.onnx.branches`).
        branches: of all linear layers.
        matrices: the graph inputs that hold theirs.
    """

    trace: Trace
    sizes: Sizes
    symbolic: ir.Model
    model: ir.Model
    condition_names: tuple[str, ...]
    features: tuple[tuple[str, ...], ...]
    rank: int = 0
    branches: tuple[BranchRecord, ...] = ()
    matrices: tuple[str, ...] = ()

    @property
    def given(self) -> tuple[str, ...]:
        """The graph inputs that a request gives: conditions and matrices."""
        return (*self.condition_names, *self.matrices)

    @cached_property
    def site_of(self) -> Mapping[str, int]:
        """The site of each feature."""
        return {name: site for site, names in enumerate(self.features) for name in names}

    @cached_property
    def channel_axes(self) -> Mapping[str, int]:
        """The axis of each feature along which its channels lie."""
        return {name: self.trace.sites[site].channel_axis for name, site in self.site_of.items()}

    @cached_property
    def producers(self) -> Mapping[str, ir.Node]:
        """The node that computes each output of the graph."""
        nodes = {value.name: value.producer() for value in self.model.graph.outputs}
        return {name: node for name, node in nodes.items() if name and node is not None}

    @cached_property
    def loop_nodes(self) -> frozenset[ir.Node]:
        """The nodes that depend on the values of the latent, or of what else changes from step to step."""
        sources = sources_of(self.model.graph)
        return frozenset(node for node in self.model.graph if binding_of(sources[node.outputs[0]]) == "loop")

    @property
    def rows(self) -> set[Size]:
        """The lengths of a batch: of images, and of the denoiser's rows."""
        batch = self.sizes.batch
        if isinstance(batch, int):
            return {batch * passes for passes in range(1, 1 + self.trace.rows)}
        return {"batch", *(f"{passes}*batch" for passes in range(2, 1 + self.trace.rows))}

    @property
    def best(self) -> Mapping[str, int]:
        """The values of the axes where MACs are counted."""
        return values_at(self.sizes.axes, "opt")

    @property
    def row_count(self) -> int:
        """Rows of the denoiser's batch where MACs are counted."""
        batch = self.sizes.batch
        return self.trace.rows * (batch if isinstance(batch, int) else batch.opt)


def feature_name(site: str, output: int) -> str:
    """Return the name of a site's output in the graph: ``feature.<site>``, then ``#1``, ``#2`` for further ones."""
    return f"feature.{site}" + (f"#{output}" if output else "")


def denoiser_to_onnx(trace: Trace, weights: Weights, sizes: Sizes) -> DenoiserGraph:
    """Convert a trace to ONNX (opset 23), weights left where they are.

    Raises:
        DipgoError: a node that has no ONNX form, or a checkpoint that does not hold the traced parameters.
    """
    conditions = tuple(trace.model.family.example(trace.model.config, 1))
    features = tuple(
        tuple(feature_name(site.name, output) for output in range(len(values)))
        for site, values in zip(trace.sites, trace.outputs, strict=True)
    )
    symbolic = convert(
        trace.model.family.denoiser_class,
        trace.program,
        [LATENT, "timestep", *conditions],
        [EPSILON, *(name for names in features for name in names)],
    )
    latent = sizes.latent

    def make() -> ir.Model:
        model = symbolic.clone()
        specialise(model, LATENT, latent)
        return model

    model = cached(["denoiser", digest_of_program(trace.program), features, latent], make)
    parameters = {name: name.removeprefix(PREFIX) for name in trace.program.graph_signature.parameters}
    for graph in (symbolic, model):
        bind(graph, parameters, weights.tensors, weights.root)
    return DenoiserGraph(trace, sizes, symbolic, model, conditions, features)
