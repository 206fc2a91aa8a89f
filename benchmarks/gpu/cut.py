"""One signature of a traced denoiser as a torch module: what ε and the stored sites need, and nothing else.

The dependents of a skipped site are not in the module at all, as they are not in an exported graph. It has no control
flow, so it runs eagerly, under ``torch.compile``, and inside a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from dipgo.eager.gating import combine
from dipgo.graph.trace import Trace

_PREFIX = "guided.denoiser."  # what the trace calls the denoiser


def values_of(trace: Trace, denoiser: nn.Module, device: torch.device) -> dict[str, torch.Tensor]:
    """Return the tensor behind every input of the traced graph that is not the caller's, on ``device``.

    Parameters and buffers are the denoiser's own, shared and not copied; constants of the trace are moved.
    """
    held = dict(denoiser.named_parameters(remove_duplicate=False)) | dict(
        denoiser.named_buffers(remove_duplicate=False)
    )
    signature = trace.program.graph_signature
    named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    values = {place: held[name.removeprefix(_PREFIX)].detach() for place, name in named.items()}
    constants = trace.program.constants
    for place, name in signature.inputs_to_lifted_tensor_constants.items():
        value = constants[name]
        assert isinstance(value, torch.Tensor)
        values[place] = value.to(device)
    return values


def cut(
    trace: Trace,
    served: Sequence[int],
    stored: Sequence[int],
    terms: int,
    values: Mapping[str, torch.Tensor],
    device: torch.device,
) -> fx.GraphModule:
    """Return the module of a signature.

    Args:
        served: the skipped sites that are read.
        stored: the computed sites whose outputs are handed out.
        terms: K, how many past outputs a backup combines; 0 where it is the last output as it is.
        values: see :func:`values_of`.

    Returns:
        ``forward(latent, timestep, *conditions, *pasts) -> (ε, outputs of stored sites)``. For each output of each
        served site ``pasts`` has that output, or, with K terms, K of them, newest first, and weights ``[K, …]``.
    """
    graph, root = fx.Graph(), dict[str, torch.Tensor]()
    made: dict[str, Any] = {name: graph.placeholder(name) for name in trace.program.graph_signature.user_inputs}
    for site in served:
        for name in trace.outputs[site]:
            past = [graph.placeholder(f"past_{name}_{term}") for term in range(max(1, terms))]
            made[name] = past[0]
            if terms:
                weights = graph.placeholder(f"weights_{name}")
                made[name] = graph.call_function(combine, (past, weights, trace.sites[site].channel_axis))
    outputs = [name for site in stored for name in trace.outputs[site]]
    live = _live(trace, [trace.epsilon, *outputs], set(made))
    for node in trace.program.graph_module.graph.nodes:
        if node.name in made or node.name not in live:
            continue
        if node.op == "placeholder":
            root[node.name] = values[node.name]
            made[node.name] = graph.get_attr(node.name)
        elif node.op == "get_attr":
            root[node.name] = getattr(trace.program.graph_module, str(node.target)).to(device)
            made[node.name] = graph.get_attr(node.name)
        else:
            copied = graph.node_copy(node, lambda source: made[source.name])
            copied.args, copied.kwargs = pytree.tree_map_only(
                torch.device, lambda _: device, (copied.args, copied.kwargs)
            )
            made[node.name] = copied
    graph.output((made[trace.epsilon], [made[name] for name in outputs]))
    return fx.GraphModule(root, graph)


def _live(trace: Trace, wanted: Sequence[str], stops: set[str]) -> set[str]:
    """Return the names of the nodes that ``wanted`` need; the walk back ends at ``stops``."""
    nodes = {node.name: node for node in trace.program.graph_module.graph.nodes}
    live: set[str] = set()
    stack = list(wanted)
    while stack:
        name = stack.pop()
        if name not in live:
            live.add(name)
            if name not in stops:
                stack.extend(source.name for source in nodes[name].all_input_nodes)
    return live
