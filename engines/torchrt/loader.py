"""An ONNX graph as a torch.fx module: one call for each node, sizes fixed.

What depends on constants and sizes alone is computed while the module is made. So shapes, axes and pads are plain
numbers in it, and a graph of dynamic sizes becomes a static module for each choice of them.
"""

from __future__ import annotations

import inspect
import operator as operators
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from dipgo.base.dtypes import BY_ONNX
from dipgo.base.errors import DipgoError
from engines.torchrt.layers import Unsupported
from engines.torchrt.operators import OPERATORS, Operator
from engines.torchrt.weights import Weights


@dataclass(frozen=True)
class Input:
    """What a module takes at one position."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class TorchGraph:
    """A graph as a module: takes tensors in the order of ``inputs``, returns a tuple in the order of ``outputs``.

    Its weights are buffers, shared with all modules that have the same :class:`Weights`.
    """

    module: fx.GraphModule
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    device: torch.device


def module_from_graph(path: Path, weights: Weights, shapes: Mapping[str, Sequence[int]] | None = None) -> TorchGraph:
    """Turn an ONNX file into a module.

    Args:
        path: the file.
        weights: where its external tensors are found; their device is the module's.
        shapes: of inputs whose shapes the graph leaves open.

    Raises:
        DipgoError: an operator, or a use of one, that torch has no function for here; or no ONNX file.
    """
    try:
        graph = ir.load(path).graph
    except Exception as error:  # protobuf and onnx_ir raise classes of their own
        raise DipgoError(f"{path}: no ONNX file that can be read; export it again") from error
    builder = _ModuleBuilder(path, weights)
    inputs = tuple(_input(path, value, (shapes or {}).get(str(value.name))) for value in graph.inputs)
    for position, (value, tensor) in enumerate(zip(graph.inputs, inputs, strict=True)):
        builder.add_input(value, position, tensor)
    for value in graph.initializers.values():
        builder.add_initializer(value)
    for node in graph:
        builder.add_node(node)
    outputs = tuple(str(value.name) for value in graph.outputs)
    return TorchGraph(builder.module(graph.outputs), inputs, outputs, weights.device)


def _input(path: Path, value: ir.Value, shape: Sequence[int] | None) -> Input:
    name = str(value.name)
    sizes = shape if shape is not None else value.shape.dims if value.shape is not None else [None]
    if not all(isinstance(size, int) for size in sizes):
        raise DipgoError(f"{path}: the shape of input '{name}' is open; give it")
    return Input(
        name, BY_ONNX[int(value.dtype or 0)].torch, tuple(int(size) for size in sizes if isinstance(size, int))
    )


class _ModuleBuilder:
    """A module, node by node. Each value is a constant (a tensor on the CPU), or a node of the module."""

    def __init__(self, path: Path, weights: Weights) -> None:
        self._path, self._weights = path, weights
        self._graph, self._root = fx.Graph(), torch.nn.Module()
        self._constants: dict[ir.Value, torch.Tensor] = {}
        self._nodes: dict[ir.Value, fx.Node] = {}
        self._meta: dict[fx.Node, torch.Tensor] = {}
        self._buffers: dict[int, fx.Node] = {}  # by the id of the tensor, which the module keeps alive

    def add_input(self, value: ir.Value, position: int, tensor: Input) -> None:
        node = self._graph.placeholder(f"input_{position}")
        self._nodes[value] = node
        self._meta[node] = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    def add_initializer(self, value: ir.Value) -> None:
        """Take an initializer: one outside the graph is a weight, one inside is a constant."""
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            self._nodes[value] = self._buffer(self._weights.find(tensor), "weight")
        elif tensor is not None:
            self._constants[value] = _tensor(tensor)

    def add_node(self, node: ir.Node) -> None:
        """Compute a node of constants, or add its call."""
        if node.op_type == "Constant" and "value" in node.attributes:
            self._constants[node.outputs[0]] = _tensor(node.attributes["value"].as_tensor())
            return
        operator = OPERATORS.get(node.op_type)
        if operator is None or node.domain not in ("", "ai.onnx"):
            name = f"{node.domain}.{node.op_type}".lstrip(".")
            raise self._refusal(node, f"operator {name} is unknown to it")
        attributes = {name: _plain(attribute) for name, attribute in node.attributes.items()}
        try:
            inspect.signature(operator.run).bind(*node.inputs, **attributes)
        except TypeError as error:
            raise self._refusal(node, f"{node.op_type}: {error}") from error
        except ValueError:  # torch's own functions have no signature; they take tensors alone
            pass
        try:
            results = self._results(node, operator, attributes)
        except Unsupported as error:
            raise self._refusal(node, f"{node.op_type} {error}") from error
        except (RuntimeError, TypeError, IndexError, ValueError) as error:
            detail = " ".join(str(error).split())[:200]
            raise self._refusal(node, f"{node.op_type}: {detail}") from error
        if len(results) != len(node.outputs):
            raise self._refusal(node, f"{node.op_type} with {len(node.outputs)} outputs")

    def _results(self, node: ir.Node, operator: Operator, attributes: dict[str, Any]) -> Sequence[Any]:
        """Compute the outputs of a node now, or add its call to the module."""
        if node.op_type == "Shape" and node.inputs[0] in self._nodes:
            results = _several(operator.run(self._meta[self._nodes[node.inputs[0]]], **attributes))
            self._constants.update(zip(node.outputs, results, strict=False))
            return results
        if all(value is None or value in self._constants for value in node.inputs):
            constants = [self._argument(value, k in operator.numbers, now=True) for k, value in enumerate(node.inputs)]
            results = _several(operator.run(*constants, **attributes))
            self._constants.update(zip(node.outputs, results, strict=False))
            return results
        arguments = [self._argument(value, k in operator.numbers) for k, value in enumerate(node.inputs)]
        metas = [self._meta[argument] if isinstance(argument, fx.Node) else argument for argument in arguments]
        result = operator.run(*metas, **attributes)
        call = self._graph.call_function(operator.run, tuple(arguments), attributes)
        results = _several(result)
        for position, (value, meta) in enumerate(zip(node.outputs, results, strict=False)):
            part = call
            if isinstance(result, tuple):
                part = self._graph.call_function(operators.getitem, (call, position))
            self._nodes[value], self._meta[part] = part, meta
        return results

    def _argument(self, value: ir.Value | None, number: bool, now: bool = False) -> Any:
        if value is None:
            return None
        if number:
            if value not in self._constants:
                raise Unsupported(f"with '{value.name}' computed by the graph")
            return self._constants[value].reshape(-1).tolist()
        return self._constants[value] if now else self._node(value)

    def _node(self, value: ir.Value) -> fx.Node:
        if value not in self._nodes:
            constant = self._constants[value].contiguous().to(self._weights.device)
            self._nodes[value] = self._buffer(constant, "constant")
        return self._nodes[value]

    def _buffer(self, tensor: torch.Tensor, kind: str) -> fx.Node:
        if id(tensor) not in self._buffers:
            name = f"{kind}_{len(self._buffers)}"
            self._root.register_buffer(name, tensor)
            self._buffers[id(tensor)] = node = self._graph.get_attr(name)
            self._meta[node] = torch.empty_like(tensor, device="meta")
        return self._buffers[id(tensor)]

    def module(self, outputs: Sequence[ir.Value]) -> fx.GraphModule:
        self._graph.output(tuple(self._node(value) for value in outputs))
        self._graph.eliminate_dead_code()
        self._graph.lint()
        return fx.GraphModule(self._root, self._graph)

    def _refusal(self, node: ir.Node, what: str) -> DipgoError:
        return DipgoError(f"{self._path}: the torch backend cannot run node '{node.name}': {what}; use another backend")


def _tensor(tensor: Any) -> torch.Tensor:
    """Return a tensor that lies in the graph itself."""
    dtype = BY_ONNX[int(tensor.dtype)].torch
    shape = tuple(tensor.shape.numpy())
    values = bytearray(tensor.tobytes())
    return torch.frombuffer(values, dtype=dtype).reshape(shape) if values else torch.empty(shape, dtype=dtype)


def _plain(attribute: ir.Attr) -> Any:
    """Return an attribute as torch takes it."""
    value = attribute.value
    return list(value) if isinstance(value, tuple) else value


def _several(results: Any) -> Sequence[Any]:
    return results if isinstance(results, tuple) else (results,)
