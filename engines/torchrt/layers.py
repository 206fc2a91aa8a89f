"""ONNX's layers as torch functions: products, normalisations, and what changes the size of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class Unsupported(Exception):
    """A use of an operator that no export makes, and that is not written here."""


def attention(  # noqa: PLR0913 - ONNX's own
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    is_causal: int = 0,
    softcap: float = 0.0,
    qk_matmul_output_mode: int = 0,
) -> Tensor:
    """Attention of ``[batch, heads, tokens, width]``; the mask is added, or boolean: True where to attend."""
    if query.dim() != 4 or softcap or (is_causal and mask is not None):
        raise Unsupported("with three axes, a soft cap, or both a mask and is_causal")
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(query.dtype)
    return F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=bool(is_causal), scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )


def conv(  # noqa: PLR0913 - ONNX's own
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] = (),
    group: int = 1,
    kernel_shape: Sequence[int] = (),
    pads: Sequence[int] = (),
    strides: Sequence[int] = (),
) -> Tensor:
    axes = x.dim() - 2
    if auto_pad not in ("NOTSET", "VALID") or axes not in (1, 2, 3):
        raise Unsupported(f"with auto_pad {auto_pad} on {axes} axes")
    before, after = (list(pads) or [0] * 2 * axes)[:axes], (list(pads) or [0] * 2 * axes)[axes:]
    if before != after:
        x = F.pad(x, [size for pair in zip(reversed(before), reversed(after), strict=True) for size in pair])
        before = [0] * axes
    function: Any = (F.conv1d, F.conv2d, F.conv3d)[axes - 1]
    return function(x, weight, bias, list(strides) or 1, before, list(dilations) or 1, group)


def gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    if alpha != 1 or (c is not None and (beta != 1 or c.dim() > 1)):
        raise Unsupported("with factors, or a bias of several axes")
    return F.linear(a.t() if transA else a, b if transB else b.t(), c)


def group_normalization(
    x: Tensor, scale: Tensor, bias: Tensor, *, num_groups: int, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    _in_float32(stash_type)
    return F.group_norm(x, num_groups, scale, bias, epsilon)


def layer_normalization(
    x: Tensor, scale: Tensor, bias: Tensor | None = None, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    _in_float32(stash_type)
    shape = list(x.shape[axis:])
    return F.layer_norm(x, shape, scale.expand(shape), None if bias is None else bias.expand(shape), epsilon)


def rms_normalization(
    x: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    _in_float32(stash_type)
    shape = list(x.shape[axis:])
    return F.rms_norm(x, shape, scale.to(x.dtype).expand(shape), epsilon)


def resize(  # noqa: PLR0913 - ONNX's own
    x: Tensor,
    region: Sequence[float] | None = None,
    scales: Sequence[float] | None = None,
    sizes: Sequence[int] | None = None,
    *,
    mode: str = "nearest",
    coordinate_transformation_mode: str = "half_pixel",
    nearest_mode: str = "round_prefer_floor",
    antialias: int = 0,
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    keep_aspect_ratio_policy: str = "stretch",
) -> Tensor:
    """Resize to whole sizes, each cell the one that its lower corner falls into."""
    modes = (mode, coordinate_transformation_mode, nearest_mode, keep_aspect_ratio_policy)
    if modes != ("nearest", "asymmetric", "floor", "stretch"):
        raise Unsupported(f"with {', '.join(modes)}")
    exact = list(sizes) if sizes else [size * scale for size, scale in zip(x.shape, scales or (), strict=True)]
    shape = [int(size) for size in exact]
    if shape != exact or shape[:2] != list(x.shape[:2]) or x.dim() not in (3, 4, 5):
        raise Unsupported(f"to {exact}")
    return F.interpolate(x, shape[2:], mode="nearest")


def depth_to_space(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    if mode != "CRD":
        raise Unsupported(f"with mode {mode}")
    return F.pixel_shuffle(x, blocksize)


def _in_float32(stash_type: int) -> None:
    if stash_type != 1:
        raise Unsupported("without statistics in float32")
