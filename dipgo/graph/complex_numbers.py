"""Complex numbers in an exported program as pairs of real ones: ONNX has none, and rotary embeddings use them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node
from torch.utils import _pytree as pytree

from dipgo.base.errors import DipgoError

_aten = torch.ops.aten
_BY_PART = {  # what works on the real and the imaginary part by itself
    *("add", "alias", "cat", "clone", "contiguous", "detach", "detach_", "expand", "flatten", "gather", "index"),
    *("index_select", "lift_fresh_copy", "narrow", "neg", "permute", "repeat", "reshape", "select", "slice", "split"),
    *("split_with_sizes", "squeeze", "stack", "sub", "t", "transpose", "unbind", "unsqueeze", "view", "_unsafe_view"),
    *("constant_pad_nd", "index_put", "slice_scatter", "getitem"),
}

Pair = tuple[Any, Any]


def in_real_numbers(program: ExportedProgram) -> ExportedProgram:
    """Return ``program`` with every complex tensor as two real ones; it is changed in place.

    Raises:
        DipgoError: an operator on complex numbers that has no real form here.
    """
    graph = program.graph_module.graph
    if not any(_is_complex(node.meta.get("val")) for node in graph.nodes):
        return program
    pairs: dict[Node, Pair] = {}
    mode = next(node.meta["val"].fake_mode for node in graph.nodes if hasattr(node.meta.get("val"), "fake_mode"))

    def emit(like: Node, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        made = graph.call_function(target, args, kwargs)
        made.meta = dict(like.meta)
        fakes = pytree.tree_map_only(Node, lambda node: node.meta["val"], (args, kwargs))
        with mode:
            made.meta["val"] = target(*fakes[0], **fakes[1])
        return made

    for node in list(graph.nodes):
        if node.op == "placeholder" and _is_complex(node.meta.get("val")):
            _store_as_real(program, node, mode)
            with graph.inserting_before(_first_call(graph)):
                pairs[node] = _halves(emit, node, node)
        elif node.op == "call_function" and (
            _is_complex(node.meta.get("val")) or any(each in pairs for each in node.all_input_nodes)
        ):
            with graph.inserting_before(node):
                result = _translated(node, pairs, lambda *args, node=node, **kwargs: emit(node, *args, **kwargs))
            if isinstance(result, Node):
                node.replace_all_uses_with(result)
            else:
                pairs[node] = result
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users:
            graph.erase_node(node)
    program.graph_module.recompile()
    return program


def _translated(node: Node, pairs: dict[Node, Pair], emit: Callable[..., Node]) -> Pair | Node:  # noqa: PLR0911 - one for each kind of node
    """Return the pair that stands for a complex node, or the real node in its place."""
    name = getattr(node.target, "_schema", None)
    word = name.name.removeprefix("aten::") if name else getattr(node.target, "__name__", str(node.target))
    first = node.args[0]

    def parts(value: Any) -> Pair:
        return pairs[value] if isinstance(value, Node) and value in pairs else (value, None)

    if word == "_assert_tensor_metadata":
        return first, None
    if word == "view_as_complex":
        return _halves(lambda like, *args: emit(*args), node, first)
    if word == "view_as_real":
        return emit(_aten.stack.default, list(parts(first)), -1)
    if word in ("real", "imag"):
        return parts(first)[word == "imag"]
    if word == "complex":
        return first, node.args[1]
    if word == "polar":
        length, angle = node.args
        cos, sin = emit(_aten.cos.default, angle), emit(_aten.sin.default, angle)
        return emit(_aten.mul.Tensor, length, cos), emit(_aten.mul.Tensor, length, sin)
    if word in ("_conj", "conj", "conj_physical"):
        real, imaginary = parts(first)
        return real, emit(_aten.neg.default, imaginary)
    if word in ("_to_copy", "to") and first in pairs and _is_complex(node.meta["val"]):
        dtype = node.meta["val"].dtype.to_real()
        return tuple(emit(_aten._to_copy.default, part, dtype=dtype) for part in parts(first))  # type: ignore[return-value]
    if word == "mul":
        (a, b), (c, d) = parts(first), parts(node.args[1])
        times = lambda x, y: emit(_aten.mul.Tensor, x, y)  # noqa: E731
        if b is None or d is None:
            return (times(a, c), times(a, d)) if b is None else (times(a, c), times(b, c))
        real = emit(_aten.sub.Tensor, times(a, c), times(b, d))
        return real, emit(_aten.add.Tensor, times(a, d), times(b, c))
    target = _aten.reshape.default if word in ("view", "_unsafe_view") else node.target  # halves are not contiguous
    if word in _BY_PART and all(each in pairs or not _floating(each) for each in node.all_input_nodes):
        return tuple(  # type: ignore[return-value]
            emit(target, *_part(node.args, pairs, part), **_part(node.kwargs, pairs, part)) for part in (0, 1)
        )
    raise DipgoError(f"torch.export made '{word}' of complex numbers, for which ONNX has nothing; not supported")


def _part(values: Any, pairs: dict[Node, Pair], part: int) -> Any:
    return pytree.tree_map_only(Node, lambda node: pairs[node][part] if node in pairs else node, values)


def _halves(emit: Callable[..., Node], like: Node, pair: Any) -> Pair:
    """Return the two parts of a tensor ``[…, 2]``."""
    return emit(like, _aten.select.int, pair, -1, 0), emit(like, _aten.select.int, pair, -1, 1)


def _store_as_real(program: ExportedProgram, node: Node, mode: Any) -> None:
    """Give a constant of the program the form ``[…, 2]``."""
    spec = next(spec for spec in program.graph_signature.input_specs if spec.arg.name == node.name)
    for store in (program.constants, program.state_dict):
        if spec.target in store:
            value = torch.view_as_real(store[spec.target].resolve_conj()).contiguous()
            store[spec.target] = value
            node.meta["val"] = mode.from_tensor(value, static_shapes=True)
            return
    raise DipgoError("a latent or condition of complex numbers; not supported")


def _first_call(graph: Any) -> Node:
    return next(node for node in graph.nodes if node.op != "placeholder")


def _is_complex(value: Any) -> bool:
    return any(isinstance(each, torch.Tensor) and each.is_complex() for each in pytree.tree_leaves(value))


def _floating(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor) and node.meta["val"].is_floating_point()
