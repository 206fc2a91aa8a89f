"""ONNX operators as torch functions: those that exports contain, opset 23.

A function takes the node's inputs in order (None for one left out) and its attributes by name, and returns a tensor, or
a tuple where the node has several outputs. A use that no export makes raises
:class:`~engines.torchrt.layers.Unsupported`. All run on meta tensors too: that is how :mod:`engines.torchrt.lift`
learns shapes and finds what is unsupported.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from engines.torchrt.layers import (
    Unsupported,
    attention,
    conv,
    depth_to_space,
    gelu,
    gemm,
    group_normalization,
    layer_normalization,
    resize,
)

DTYPES = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    16: torch.bfloat16,
}
"""torch's types by ONNX's numbers."""


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


def gather(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    axis %= x.dim()
    picked = x[(slice(None),) * axis + (indices.reshape(-1),)]  # a scalar index would be read on the host
    return picked.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


def gather_nd(x: Tensor, indices: Tensor, *, batch_dims: int = 0) -> Tensor:
    if batch_dims:
        raise Unsupported("with batch_dims")
    return x[indices.unbind(-1)]


def slice_(
    x: Tensor,
    starts: Sequence[int],
    ends: Sequence[int],
    axes: Sequence[int] | None = None,
    steps: Sequence[int] | None = None,
) -> Tensor:
    chosen = [slice(None)] * x.dim()
    for position, start in enumerate(starts):
        step = steps[position] if steps else 1
        if step < 1:
            raise Unsupported("backwards")
        chosen[axes[position] if axes else position] = slice(start, ends[position], step)
    return x[tuple(chosen)]


def split(x: Tensor, sizes: Sequence[int] | None = None, *, axis: int = 0, num_outputs: int = 0) -> tuple[Tensor, ...]:
    parts: int | list[int] = list(sizes) if sizes else -(-x.shape[axis] // num_outputs)
    return torch.split(x, parts, axis)


def pad(
    x: Tensor,
    pads: Sequence[int],
    value: Sequence[float] | None = None,
    axes: Sequence[int] | None = None,
    *,
    mode: str = "constant",
) -> Tensor:
    if mode != "constant":
        raise Unsupported(f"with mode {mode}")
    count = len(pads) // 2
    by_axis = {axis % x.dim(): (pads[k], pads[count + k]) for k, axis in enumerate(axes or range(count))}
    from_last = [size for axis in reversed(range(x.dim())) for size in by_axis.get(axis, (0, 0))]
    return F.pad(x, from_last, value=value[0] if value else 0)


def reshape(x: Tensor, shape: Sequence[int], *, allowzero: int = 0) -> Tensor:
    return x.reshape([x.shape[k] if size == 0 and not allowzero else size for k, size in enumerate(shape)])


def transpose(x: Tensor, *, perm: Sequence[int] = ()) -> Tensor:
    return x.permute(tuple(perm) or tuple(reversed(range(x.dim()))))


def unsqueeze(x: Tensor, axes: Sequence[int]) -> Tensor:
    rank = x.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


def squeeze(x: Tensor, axes: Sequence[int] | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(tuple(axes))


def expand(x: Tensor, shape: Sequence[int]) -> Tensor:
    return x.expand(torch.broadcast_shapes(x.shape, tuple(shape)))


def range_(start: Sequence[int], limit: Sequence[int], step: Sequence[int]) -> Tensor:
    return torch.arange(start[0], limit[0], step[0])


def identity(x: Tensor) -> Tensor:
    return x


def concat(*parts: Tensor, axis: int) -> Tensor:
    return torch.cat(parts, axis)


def cast(x: Tensor, *, to: int, saturate: int = 1) -> Tensor:
    if to not in DTYPES:
        raise Unsupported(f"to ONNX's type {to}")
    return x.to(DTYPES[to])


def divide(a: Tensor, b: Tensor) -> Tensor:
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def power(a: Tensor, b: Tensor) -> Tensor:
    return torch.pow(a, b).to(a.dtype)


def clip(x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    return x if low is None and high is None else torch.clamp(x, low, high)


def argmax(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    if select_last_index:
        raise Unsupported("with select_last_index")
    return torch.argmax(x, axis, bool(keepdims))


def is_infinite(x: Tensor, *, detect_negative: int = 1, detect_positive: int = 1) -> Tensor:
    if not (detect_negative and detect_positive):
        raise Unsupported("of one sign")
    return torch.isinf(x)


def softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    return torch.softmax(x, axis)


def reduce_mean(
    x: Tensor, axes: Sequence[int] | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> Tensor:
    return x if not axes and noop_with_empty_axes else x.mean(_all(x, axes), bool(keepdims))


def reduce_max(
    x: Tensor, axes: Sequence[int] | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> Tensor:
    return x if not axes and noop_with_empty_axes else x.amax(_all(x, axes), bool(keepdims))


def maximum(*values: Tensor) -> Tensor:
    return reduce(torch.maximum, values)


def minimum(*values: Tensor) -> Tensor:
    return reduce(torch.minimum, values)


def shape_of(x: Tensor, *, start: int = 0, end: int | None = None) -> Tensor:
    return torch.tensor(x.shape[start:end], dtype=torch.int64)


def _all(x: Tensor, axes: Sequence[int] | None) -> tuple[int, ...]:
    return tuple(axes or range(x.dim()))


OPERATORS = {
    "Abs": Operator(torch.abs),
    "Add": Operator(operator.add),
    "And": Operator(torch.logical_and),
    "ArgMax": Operator(argmax),
    "Attention": Operator(attention),
    "Cast": Operator(cast),
    "Clip": Operator(clip),
    "Concat": Operator(concat),
    "Conv": Operator(conv),
    "Cos": Operator(torch.cos),
    "DepthToSpace": Operator(depth_to_space),
    "Div": Operator(divide),
    "Equal": Operator(torch.eq),
    "Exp": Operator(torch.exp),
    "Expand": Operator(expand, (1,)),
    "Gather": Operator(gather),
    "GatherND": Operator(gather_nd),
    "Gelu": Operator(gelu),
    "Gemm": Operator(gemm),
    "Greater": Operator(torch.gt),
    "GroupNormalization": Operator(group_normalization),
    "Identity": Operator(identity),
    "IsInf": Operator(is_infinite),
    "LayerNormalization": Operator(layer_normalization),
    "Less": Operator(torch.lt),
    "Log": Operator(torch.log),
    "MatMul": Operator(torch.matmul),
    "Max": Operator(maximum),
    "Min": Operator(minimum),
    "Mul": Operator(operator.mul),
    "Neg": Operator(operator.neg),
    "Not": Operator(torch.logical_not),
    "Or": Operator(torch.logical_or),
    "Pad": Operator(pad, (1, 2, 3)),
    "Pow": Operator(power),
    "Range": Operator(range_, (0, 1, 2)),
    "Reciprocal": Operator(torch.reciprocal),
    "ReduceMax": Operator(reduce_max, (1,)),
    "ReduceMean": Operator(reduce_mean, (1,)),
    "Relu": Operator(F.relu),
    "Reshape": Operator(reshape, (1,)),
    "Resize": Operator(resize, (1, 2, 3)),
    "Shape": Operator(shape_of),
    "Sigmoid": Operator(torch.sigmoid),
    "Sin": Operator(torch.sin),
    "Slice": Operator(slice_, (1, 2, 3, 4)),
    "Softmax": Operator(softmax),
    "Split": Operator(split, (1,)),
    "Sqrt": Operator(torch.sqrt),
    "Squeeze": Operator(squeeze, (1,)),
    "Sub": Operator(operator.sub),
    "Tanh": Operator(torch.tanh),
    "Transpose": Operator(transpose),
    "Unsqueeze": Operator(unsqueeze, (1,)),
    "Where": Operator(torch.where),
}
