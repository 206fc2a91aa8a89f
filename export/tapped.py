"""The traced denoiser as ONNX: one graph with every site's outputs named, its weights pointing into their files.

Converted once per model; :mod:`export.cut` makes each graph of a program out of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import onnx_ir as ir
from onnx_ir.passes.common import ClearMetadataAndDocStringPass

from dipgo.trace import Trace
from export.convert import convert, simplify
from export.launches import EPSILON, LATENT
from export.weights import Weights, bind

_PREFIX = "guided.denoiser."


@dataclass(frozen=True)
class Tapped:
    """The whole denoiser in ONNX.

    Attributes:
        trace: what it was made from.
        batch: images per call of ``model``.
        symbolic: the graph as converted, for any number of images.
        model: the graph at ``batch`` images, optimised; outputs are ``epsilon`` and every site's :attr:`features`.
        condition_names: the graph inputs that carry the conditions.
        features: the names of each site's outputs, see :func:`feature_name`.
    """

    trace: Trace
    batch: int
    symbolic: ir.Model
    model: ir.Model
    condition_names: tuple[str, ...]
    features: tuple[tuple[str, ...], ...]

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
        made = {value.name: value.producer() for value in self.model.graph.outputs}
        return {name: node for name, node in made.items() if name and node is not None}

    @cached_property
    def loop_nodes(self) -> frozenset[ir.Node]:
        """The nodes that depend on the latent."""
        latent = next(value for value in self.model.graph.inputs if value.name == LATENT)
        reached = {latent}
        nodes = set()
        for node in self.model.graph:
            if reached.intersection(node.inputs):
                nodes.add(node)
                reached.update(node.outputs)
        return frozenset(nodes)


def feature_name(site: str, output: int) -> str:
    """Return the name of a site's output in the graph: ``feature.<site>``, then ``#1``, ``#2`` for further ones."""
    return f"feature.{site}" + (f"#{output}" if output else "")


def to_onnx(trace: Trace, weights: Weights, batch: int = 1) -> Tapped:
    """Convert a trace to ONNX (opset 23), weights left where they are.

    Raises:
        DipgoError: a node that has no ONNX form, or a checkpoint that does not hold the traced parameters.
    """
    conditions = tuple(trace.model.family.example(trace.model.config, 1))
    features = tuple(
        tuple(feature_name(site.name, output) for output in range(len(values)))
        for site, values in zip(trace.sites, trace.outputs, strict=True)
    )
    model = convert(
        trace.model.family.denoiser_class,
        trace.program,
        None,
        [LATENT, "timestep", *conditions],
        [EPSILON, *(name for names in features for name in names)],
        optimize=False,
    )
    parameters = {name: name.removeprefix(_PREFIX) for name in trace.program.graph_signature.parameters}
    bind(model, parameters, weights.tensors, weights.root)
    ClearMetadataAndDocStringPass()(model)
    static = model.clone()
    specialise(static, batch)
    return Tapped(trace, batch, model, static, conditions, features)


def specialise(model: ir.Model, batch: int) -> None:
    """Fix the number of images, which is the only symbolic size, and simplify."""
    values = [*model.graph.inputs, *(output for node in model.graph for output in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape([_size(dimension, batch) for dimension in value.shape])
    simplify(model)


def _size(dimension: int | ir.SymbolicDim, batch: int) -> int | ir.SymbolicDim:
    """Evaluate a size: a whole number, the number of images, or a multiple of it such as ``2*s0``."""
    if isinstance(dimension, int) or dimension.value is None:
        return dimension
    factor = re.fullmatch(r"(?:(\d+)\*)?s\d+", str(dimension.value))
    if factor is None:
        return ir.SymbolicDim(None)
    return int(factor[1] or 1) * batch
