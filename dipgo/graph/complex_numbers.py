"""Complex numbers in an exported program as pairs of real ones: ONNX has none, and rotary embeddings use them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node
from torch.utils import _pytree as pytree

from dipgo.base.errors import DipgoError

_aten = torch.ops.aten
_BY_PART = """
_to_copy add alias cat clone constant_pad_nd contiguous detach detach_ expand flatten gather getitem index index_put
index_select lift_fresh_copy narrow neg permute repeat reshape select slice slice_scatter split split_with_sizes squeeze
stack sub t to transpose unbind unsqueeze view _unsafe_view
"""  # what works on the real and the imaginary part by itself

Pair = tuple[Any, Any]
Emit = Callable[..., Node]


def in_real_numbers(program: ExportedProgram) -> ExportedProgram:
    """Return ``program`` with every complex tensor as two real ones; it is changed in place.

    Raises:
        DipgoError: an operator on complex numbers that has no real form here.
    """
    graph = program.graph_module.graph
    if not any(_is_complex(node.meta.get("val")) for node in graph.nodes):
        return program
    pairs: dict[Node, Pair] = {}
    done: list[Node] = []
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
                pairs[node] = _halves(partial(emit, node), node)
        elif node.op == "call_function" and (
            _is_complex(node.meta.get("val")) or any(each in pairs for each in node.all_input_nodes)
        ):
            with graph.inserting_before(node):
                result = _translated(node, pairs, partial(emit, node))
            done.append(node)
            if isinstance(result, Node):
                node.replace_all_uses_with(result)
            else:
                pairs[node] = result
    for node in reversed(done):
        graph.erase_node(node)
    program.graph_module.recompile()
    return program


def _translated(node: Node, pairs: dict[Node, Pair], emit: Emit) -> Pair | Node:
    """Return the pair that stands for a complex node, or the real node in its place."""
    schema = getattr(node.target, "_schema", None)
    word = schema.name.removeprefix("aten::") if schema else getattr(node.target, "__name__", str(node.target))
    if rule := _RULES.get(word):
        return rule(
            emit, *(pairs.get(each, (each, None)) if isinstance(each, Node) else (each, None) for each in node.args)
        )
    if word not in _BY_PART.split() or any(each not in pairs and _floating(each) for each in node.all_input_nodes):
        raise DipgoError(f"torch.export made '{word}' of complex numbers, for which ONNX has nothing; not supported")
    target = _aten.reshape.default if word in ("view", "_unsafe_view") else node.target  # halves are not contiguous
    real, imaginary = (
        emit(target, *_part(node.args, pairs, part), **_part(node.kwargs, pairs, part)) for part in (0, 1)
    )
    return real, imaginary


def _part(values: Any, pairs: dict[Node, Pair], part: int) -> Any:
    def of(leaf: Any) -> Any:
        if isinstance(leaf, torch.dtype):
            return leaf.to_real() if leaf.is_complex else leaf
        return pairs[leaf][part] if isinstance(leaf, Node) and leaf in pairs else leaf

    return pytree.tree_map(of, values)


def _halves(emit: Emit, pair: Any) -> Pair:
    """Return the two parts of a tensor ``[…, 2]``."""
    return emit(_aten.select.int, pair, -1, 0), emit(_aten.select.int, pair, -1, 1)


def _polar(emit: Emit, length: Pair, angle: Pair) -> Pair:
    cos, sin = (emit(turned, angle[0]) for turned in (_aten.cos.default, _aten.sin.default))
    return emit(_aten.mul.Tensor, length[0], cos), emit(_aten.mul.Tensor, length[0], sin)


def _product(emit: Emit, first: Pair, second: Pair) -> Pair:
    def times(x: Any, y: Any) -> Node:
        return emit(_aten.mul.Tensor, x, y)

    (a, b), (c, d) = first, second
    if b is None:
        return times(a, c), times(a, d)
    if d is None:
        return times(a, c), times(b, c)
    real = emit(_aten.sub.Tensor, times(a, c), times(b, d))
    return real, emit(_aten.add.Tensor, times(a, d), times(b, c))


_RULES: Mapping[str, Callable[..., Pair | Node]] = {  # of pairs; a real argument is one with None
    "_assert_tensor_metadata": lambda emit, value, *_: (None, None),
    "_conj": lambda emit, value: (value[0], emit(_aten.neg.default, value[1])),
    "complex": lambda emit, real, imaginary: (real[0], imaginary[0]),
    "imag": lambda emit, value: value[1],
    "mul": _product,
    "polar": _polar,
    "real": lambda emit, value: value[0],
    "view_as_complex": lambda emit, value: _halves(emit, value[0]),
    "view_as_real": lambda emit, value: emit(_aten.stack.default, list(value), -1),
}


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
