"""ONNX's operators on elements, axes and sizes as torch functions; layers are in :mod:`engines.torchrt.layers`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor
from torch.nn import functional as F

from dipgo.base.dtypes import BY_ONNX
from engines.torchrt.layers import Unsupported


def gather(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    axis %= x.dim()
    rows = x[(slice(None),) * axis + (indices.reshape(-1),)]  # a scalar index would be read on the host
    return rows.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


def scatter_nd(x: Tensor, indices: Tensor, updates: Tensor, *, reduction: str = "none") -> Tensor:
    if reduction != "none":
        raise Unsupported(f"with reduction {reduction}")
    return x.index_put(tuple(indices.unbind(-1)), updates)


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
    slices = [slice(None)] * x.dim()
    for position, start in enumerate(starts):
        step = steps[position] if steps else 1
        if step < 1:
            raise Unsupported("backwards")
        slices[axes[position] if axes else position] = slice(start, ends[position], step)
    return x[tuple(slices)]


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


def tile(x: Tensor, repeats: Sequence[int]) -> Tensor:
    return x.repeat(*repeats)


def range_(start: Sequence[int], limit: Sequence[int], step: Sequence[int]) -> Tensor:
    return torch.arange(start[0], limit[0], step[0])


def identity(x: Tensor) -> Tensor:
    return x


def concat(*parts: Tensor, axis: int) -> Tensor:
    return torch.cat(parts, axis)


def cast(x: Tensor, *, to: int, saturate: int = 1) -> Tensor:
    if to not in BY_ONNX:
        raise Unsupported(f"to ONNX's type {to}")
    return x.to(BY_ONNX[to].torch)


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
    return x if not axes and noop_with_empty_axes else x.mean(_every(x, axes), bool(keepdims))


def reduce_max(
    x: Tensor, axes: Sequence[int] | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> Tensor:
    return x if not axes and noop_with_empty_axes else x.amax(_every(x, axes), bool(keepdims))


def maximum(*values: Tensor) -> Tensor:
    return reduce(torch.maximum, values)


def minimum(*values: Tensor) -> Tensor:
    return reduce(torch.minimum, values)


def shape_of(x: Tensor, *, start: int = 0, end: int | None = None) -> Tensor:
    return torch.tensor(x.shape[start:end], dtype=torch.int64)


def _every(x: Tensor, axes: Sequence[int] | None) -> tuple[int, ...]:
    return tuple(axes or range(x.dim()))
