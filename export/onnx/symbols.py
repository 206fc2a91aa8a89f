"""Graphs whose sizes are known only when they run: named axes in the place of the exporter's symbols.

The exporter writes every size as an expression over symbols of its own, and computes what nodes need of them (targets
of Reshape, mostly) from the shapes of the graph's inputs. :func:`name_axes` evaluates that arithmetic on symbols while
compiling: most of it becomes constants, and the rest is read off the shape of the latent, so that a graph can be cut
anywhere as if all sizes were known.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache

import numpy as np
import onnx_ir as ir
import sympy  # type: ignore[import-untyped]

from dipgo.base.errors import DipgoError
from export.onnx.arithmetic import Reads, SizeBuilder, evaluate_node, small_number, whole
from export.records.graphs import Size


def name_axes(model: ir.Model, latent: str, sizes: Sequence[Size]) -> None:
    """Fix or name the sizes of the input ``latent``, and with them all sizes of the graph, in place.

    ``sizes`` has a number or the name of an axis for each of its dimensions.

    Raises:
        DipgoError: a size that does not follow from these.
    """
    graph = model.graph
    source = next(value for value in graph.inputs if value.name == latent)
    values: dict[sympy.Symbol, sympy.Expr] = {}
    reads: Reads = {}
    for position, (own, size) in enumerate(zip(_symbolic(source), sizes, strict=True)):
        if not own.free_symbols:
            continue
        (symbol,) = own.free_symbols
        factor = int(own.coeff(symbol))
        if isinstance(size, int):
            values[symbol] = sympy.Integer(size) / factor
        else:
            values[symbol] = _symbol(size) / factor
            reads[symbol] = (source, position, sympy.Rational(1, factor))
    fixed = {symbol: value for symbol, value in values.items() if symbol not in reads}
    if reads:
        _settle(graph, fixed, reads)
    _rename(graph, values, _symbolic)


def sizes_of(value: ir.Value) -> list[Size]:
    """Return the shape of a value: whole numbers, and expressions over the axes.

    Raises:
        DipgoError: a size that nothing is known of.
    """
    assert value.shape is not None
    sizes: list[Size] = []
    for size in value.shape:
        if not isinstance(size, int) and size.value is None:
            raise DipgoError(f"the size of '{value.name}' does not follow from the batch and the latent's size")
        sizes.append(size if isinstance(size, int) else str(size.value))
    return sizes


def scale_batch(model: ir.Model, axes: Iterable[str], times: int) -> None:
    """Let the batch of a graph be ``times`` as long as its axis, in the shapes of its values; others stay."""
    sizes = {_symbol(axis): times * _symbol(axis) if axis == "batch" else _symbol(axis) for axis in axes}
    _rename(model.graph, sizes, _exact)


def read_elsewhere(graph: ir.Graph, latent: str) -> None:
    """Where a graph reads the latent for nothing but its shape, read that off another input which shows it too."""
    source = next((value for value in graph.inputs if value.name == latent), None)
    if source is None or any(use.node.op_type != "Shape" for use in source.uses()) or source.is_graph_output():
        return
    for use in list(source.uses()):
        node = use.node
        axis = _exact(source)[node.attributes.get_int("start", 0)]
        shown = _shown(graph, axis, source)
        if shown is None:
            return
        builder = SizeBuilder({axis: shown}, f"{node.name}.other")
        value = builder.build([axis], one_dimensional=True)
        graph.insert_before(node, builder.nodes)
        node.outputs[0].replace_all_uses_with(value)
        graph.remove(node, safe=True)
    graph.inputs.remove(source)


def shape_value(graph: ir.Graph, sizes: Sequence[Size], stem: str) -> tuple[ir.Value, list[ir.Node]]:
    """Return a value that holds ``sizes`` ``[n]`` int64 when the graph runs, and the nodes that compute it.

    Raises:
        DipgoError: sizes that no input of the graph shows.
    """
    exact = [_parse(str(size).replace("//", "/")) for size in sizes]
    axes = {axis for size in exact for axis in size.free_symbols}
    builder = SizeBuilder({axis: shown for axis in axes if (shown := _shown(graph, axis)) is not None}, stem)
    return builder.build(exact, one_dimensional=True), builder.nodes


def _shown(
    graph: ir.Graph, axis: sympy.Symbol, but: ir.Value | None = None
) -> tuple[ir.Value, int, sympy.Rational] | None:
    """Return an input that is read, its dimension, and by what that is to be multiplied to give the axis."""
    for value in graph.inputs:
        if value is but or value.shape is None or not (value.uses() or value.is_graph_output()):
            continue
        for position, size in enumerate(_exact(value)):
            if size.free_symbols and (axis / size).is_Rational:
                return value, position, axis / size
    return None


def _settle(graph: ir.Graph, fixed: Mapping[sympy.Symbol, sympy.Expr], reads: Reads) -> None:
    """Evaluate the arithmetic on sizes, and give nodes that read its results constants, or what is left of it."""
    known: dict[ir.Value, np.ndarray] = {}

    def sizes(value: ir.Value) -> list[sympy.Expr]:
        return [size.subs(fixed) for size in _symbolic(value)]

    builder = SizeBuilder(reads, "size")
    for node in list(graph):
        result = evaluate_node(node, known, sizes)
        if result is not None:
            known[node.outputs[0]] = result
            continue
        read = {k: known[value] for k, value in enumerate(node.inputs) if value is not None and value in known}
        source = node.inputs[0] if node.inputs else None
        if node.op_type == "SplitToSequence" and list(read) == [1] and source is not None:
            _split(graph, node, read[1], sizes(source))
            continue
        for position, target in read.items():
            if node.op_type == "Reshape" and position == 1 and source is not None and source.shape is not None:
                target = _target(target, sizes(source))  # noqa: PLW2901 - what is left of it
                node.attributes.pop("allowzero", None)
            shape = builder.build(list(target.reshape(-1)), one_dimensional=target.ndim == 1)
            graph.insert_before(node, builder.nodes)
            builder.nodes.clear()
            node.replace_input_with(position, shape)


def _target(sizes: np.ndarray, source: Sequence[sympy.Expr]) -> np.ndarray:
    """Return the target of a Reshape with as few sizes in it as can be: 0 takes one over, -1 stands for the last."""
    target = list(sizes.reshape(-1))
    for k, size in enumerate(target):
        if size.free_symbols and k < len(source) and sympy.expand(size - source[k]) == 0:
            target[k] = sympy.Integer(0)
    left = [k for k, size in enumerate(target) if size.free_symbols]
    if left and -1 not in target:
        target[left[-1]] = sympy.Integer(-1)
    return np.array(target, object)


def _split(graph: ir.Graph, node: ir.Node, size: np.ndarray, source: Sequence[sympy.Expr]) -> None:
    """Turn a split into equal parts, whose size is known only when the graph runs, into Split by their number."""
    axis = node.attributes.get_int("axis", 0)
    parts = {sympy.simplify(source[axis] / each) for each in size.reshape(-1)}
    count = parts.pop()
    if parts or not count.is_Integer:
        raise DipgoError(f"'{node.name}' splits a size that is not known into parts that are not equal; not supported")
    split = ir.node("Split", [node.inputs[0]], {"axis": axis, "num_outputs": int(count)}, num_outputs=int(count))
    split.name = f"{node.name}.equal"
    graph.insert_before(node, split)
    for number, value in enumerate(split.outputs):
        value.name = f"{node.name}.{number}"
        value.type = node.inputs[0].type if node.inputs[0] is not None else None
    for use in list(node.outputs[0].uses()):
        index = small_number(use.node.inputs[1]) if use.node.op_type == "SequenceAt" else None
        if index is None:
            raise DipgoError(f"'{use.node.name}' reads a sequence of tensors; not supported")
        part, taken = split.outputs[whole(index)[0]], use.node.outputs[0]
        part.shape = taken.shape
        taken.replace_all_uses_with(part, replace_graph_outputs=True)
        graph.remove(use.node, safe=True)
    graph.remove(node, safe=True)


def _symbolic(value: ir.Value, divide: str = "//") -> list[sympy.Expr]:
    """Return a value's sizes over the exporter's symbols."""
    assert value.shape is not None
    texts = [str(size if isinstance(size, int) else size.value or "unknown") for size in value.shape]
    return [_parse(text.replace("//", divide)) for text in texts]


def _exact(value: ir.Value) -> list[sympy.Expr]:
    """Return a value's sizes over the axes: their divisions come out even."""
    return _symbolic(value, divide="/")


@lru_cache(maxsize=65536)
def _parse(text: str) -> sympy.Expr:
    names = {name: _symbol(name) for name in re.findall(r"[A-Za-z_]\w*", text) if not hasattr(sympy, name)}
    return sympy.sympify(text, locals=names)


def _symbol(name: str) -> sympy.Symbol:
    return sympy.Symbol(name, integer=True, positive=True)


def _rename(
    graph: ir.Graph, values: Mapping[sympy.Symbol, sympy.Expr], read: Callable[[ir.Value], list[sympy.Expr]]
) -> None:
    """Replace symbols in the shapes of all values; what holds others becomes unknown."""
    key = tuple(values.items())
    for value in [*graph.inputs, *(value for node in graph for value in node.outputs)]:
        if value.shape is not None:
            value.shape = ir.Shape([_text(size, key) for size in read(value)])


@lru_cache(maxsize=65536)
def _text(size: sympy.Expr, values: tuple[tuple[sympy.Symbol, sympy.Expr], ...]) -> Size | ir.SymbolicDim:
    """Return a size with symbols replaced: a number, or text that :func:`export.axes.evaluate` takes."""
    replaced = sympy.expand(size.subs(dict(values), simultaneous=True))
    if replaced.is_Integer:
        return int(replaced)
    if not replaced.is_polynomial() or not size.free_symbols <= {symbol for symbol, _ in values}:
        return ir.SymbolicDim(None)
    numerator, denominator = sympy.fraction(sympy.together(replaced))
    text = str(sympy.expand(numerator))
    if denominator == 1:
        return text
    return f"({text})//{denominator}" if sympy.expand(numerator).is_Add else f"{text}//{denominator}"
