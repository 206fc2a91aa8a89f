"""ONNX operators as torch functions: those that exports contain, opset 23.

A function takes the node's inputs in order (None for one left out) and its attributes by name, and returns a tensor, or
a tuple where the node has several outputs. A use that no export makes raises
:class:`~engines.torchrt.layers.Unsupported`. All run on meta tensors too: that is how :mod:`engines.torchrt.loader`
learns shapes and finds what is unsupported.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from engines.torchrt import layers, tensors


@dataclass(frozen=True)
class Operator:
    """How an ONNX operator runs.

    Attributes:
        run: the function.
        numbers: the inputs that ``run`` takes as lists of numbers instead of tensors (shapes, axes, pads): they must
            be known before the graph runs.
    """

    run: Callable[..., Any]
    numbers: tuple[int, ...] = ()


OPERATORS = {
    "Abs": Operator(torch.abs),
    "Add": Operator(operator.add),
    "And": Operator(torch.logical_and),
    "ArgMax": Operator(tensors.argmax),
    "Attention": Operator(layers.attention),
    "Cast": Operator(tensors.cast),
    "Clip": Operator(tensors.clip),
    "Concat": Operator(tensors.concat),
    "Conv": Operator(layers.conv),
    "Cos": Operator(torch.cos),
    "DepthToSpace": Operator(layers.depth_to_space),
    "Div": Operator(tensors.divide),
    "Equal": Operator(torch.eq),
    "Exp": Operator(torch.exp),
    "Expand": Operator(tensors.expand, (1,)),
    "Gather": Operator(tensors.gather),
    "GatherND": Operator(tensors.gather_nd),
    "Gelu": Operator(F.gelu),
    "Gemm": Operator(layers.gemm),
    "Greater": Operator(torch.gt),
    "GroupNormalization": Operator(layers.group_normalization),
    "Identity": Operator(tensors.identity),
    "IsInf": Operator(tensors.is_infinite),
    "LayerNormalization": Operator(layers.layer_normalization),
    "Less": Operator(torch.lt),
    "Log": Operator(torch.log),
    "MatMul": Operator(torch.matmul),
    "Max": Operator(tensors.maximum),
    "Min": Operator(tensors.minimum),
    "Mul": Operator(operator.mul),
    "Neg": Operator(operator.neg),
    "Not": Operator(torch.logical_not),
    "Or": Operator(torch.logical_or),
    "Pad": Operator(tensors.pad, (1, 2, 3)),
    "Pow": Operator(tensors.power),
    "RMSNormalization": Operator(layers.rms_normalization),
    "Range": Operator(tensors.range_, (0, 1, 2)),
    "Reciprocal": Operator(torch.reciprocal),
    "ReduceMax": Operator(tensors.reduce_max, (1,)),
    "ReduceMean": Operator(tensors.reduce_mean, (1,)),
    "Relu": Operator(F.relu),
    "Reshape": Operator(tensors.reshape, (1,)),
    "Resize": Operator(layers.resize, (1, 2, 3)),
    "ScatterND": Operator(tensors.scatter_nd),
    "Shape": Operator(tensors.shape_of),
    "Sigmoid": Operator(torch.sigmoid),
    "Sin": Operator(torch.sin),
    "Slice": Operator(tensors.slice_, (1, 2, 3, 4)),
    "Softmax": Operator(tensors.softmax),
    "Split": Operator(tensors.split, (1,)),
    "Sqrt": Operator(torch.sqrt),
    "Squeeze": Operator(tensors.squeeze, (1,)),
    "Sub": Operator(operator.sub),
    "Tanh": Operator(torch.tanh),
    "Tile": Operator(tensors.tile, (1,)),
    "Transpose": Operator(tensors.transpose),
    "Unsqueeze": Operator(tensors.unsqueeze, (1,)),
    "Where": Operator(torch.where),
}
