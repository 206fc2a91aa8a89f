"""How multiply-accumulates are counted: by torch's own counter, or layer by layer as DiP-GO's figures are."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.fx import Node
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from dipgo.graph.costs import Costs
from dipgo.model.models import Model

if TYPE_CHECKING:
    from dipgo.graph.trace import Trace

_PRODUCTS = ("conv", "linear", "mm", "matmul", "einsum", "attention", "addmv", "bilinear")


def call_macs(model: Model, denoiser: nn.Module) -> int:
    """MACs of one call of the whole denoiser, counted without a trace: quicker, where sites do not matter."""
    example = model.family.example(model.config, 1)
    blank = {name: value.to("meta") for name, value in example.items()}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        latent = torch.empty(model.latent_shape(1), device="meta")
        model.family.call(denoiser.to("meta"), latent, torch.ones(1, device="meta"), blank)
    return counter.get_total_flops() // 2


def node_macs(node: Node) -> int:
    """Count one node by torch's own flop counter, on the meta device: there attention is two counted products."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return 0
    if not any(part in str(node.target) for part in _PRODUCTS):
        return 0

    def blank(value: Any) -> Any:
        example = value.meta.get("val") if isinstance(value, Node) else value
        if isinstance(example, torch.Tensor):
            return torch.empty([size_hint(size) for size in example.shape], dtype=example.dtype, device="meta")
        return size_hint(example)

    args, kwargs = pytree.tree_map_only(Node, blank, (node.args, node.kwargs))
    with FlopCounterMode(display=False) as counter:
        node.target(*args, **kwargs)
    return counter.get_total_flops() // 2


def size_hint(size: Any) -> Any:
    """Return a symbolic size as it is in the example, anything else as it is."""
    return size.node.hint if isinstance(size, torch.SymInt) else size


def layer_macs(trace: Trace) -> Costs:
    """Return costs in MACs counted from layers, as DiP-GO's figures are: without attention products.

    As in the public code's counter a convolution's bias counts once an output element, a linear layer's once an
    output feature, and a normalisation twice an element (together 0.07 % on SD-1.5).
    """

    def of(node: Node) -> int:
        macs, target = trace.node_macs[node.name], str(node.target) if node.op == "call_function" else ""
        bias = len(node.args) > 2 and isinstance(node.args[2], Node)
        if "attention" in target:
            return 0
        if "_norm" in target:
            return 2 * prod(trace.shape(node.name, 1)) // trace.rows
        if bias and "conv" in target:
            return macs + prod(trace.shape(node.name, 1)) // trace.rows
        if bias and "linear" in target:
            return macs + trace.shape(node.name, 1)[-1]
        return macs

    nodes = (node for node in trace.program.graph_module.graph.nodes if node.name in trace.node_macs)
    return Costs(trace, "MACs", {node.name: of(node) for node in nodes})
