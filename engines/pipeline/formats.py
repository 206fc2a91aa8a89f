"""Noise and images as users of diffusers pass and get them: seeds, generators, tensors, formats."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dipgo.base.errors import UsageError
from dipgo.base.layout import Layout
from engines.pipeline.images import to_image
from engines.pipeline.noise import torch_randn

FORMATS = ("pil", "np", "pt", "latent")


@dataclass(frozen=True)
class Output:
    """What a call returns, read as diffusers' outputs are: ``.images``, ``["images"]`` or ``[0]``.

    Attributes:
        images: a list of pictures; an array ``[n, height, width, channels]`` or a tensor ``[n, channels, height,
            width]`` in [0, 1]; or latents ``[n, C, H, W]``.
    """

    images: Any

    def __getitem__(self, key: Any) -> Any:
        return getattr(self, key) if isinstance(key, str) else (self.images,)[key]

    def to_tuple(self) -> tuple[Any]:
        return (self.images,)


def is_torch(value: Any) -> bool:
    """Whether a value is a tensor or generator of torch, or a list of such; torch is not imported to find out."""
    torch = sys.modules.get("torch")
    if isinstance(value, list | tuple):
        return any(is_torch(entry) for entry in value)
    return torch is not None and isinstance(value, torch.Tensor | torch.Generator)


def to_array(value: Any) -> np.ndarray:
    """Return a tensor's or array's values on the host: floats as float32, whole numbers as they are."""
    if is_torch(value):
        tensor = value.detach().cpu()
        return np.asarray((tensor.float() if tensor.is_floating_point() else tensor).numpy())
    array = np.asarray(value)
    return array.astype(np.float32) if array.dtype.kind == "f" else array


def draw_noise(shape: Sequence[int], generator: Any, layout: Layout | None = None) -> np.ndarray:
    """Return the noise ``[n, …]``, float32, that diffusers draws with a generator; with a layout, as it packs it.

    Args:
        generator: None for a random seed; an int, a seed on the CPU; a ``torch.Generator``, which moves on; a list of
            either, one an image.

    Raises:
        UsageError: another kind of generator, a list of another length, or a seed that torch's noise cannot be
            rebuilt from.
    """
    if layout:
        return np.ascontiguousarray(layout(draw_noise((shape[0], *layout.before), generator)))
    if isinstance(generator, list | tuple):
        if len(generator) == 1:
            return draw_noise(shape, generator[0])
        if len(generator) != shape[0]:
            raise UsageError(f"{len(generator)} generators for {shape[0]} images; give one an image, or one for all")
        return np.concatenate([draw_noise((1, *shape[1:]), each) for each in generator])
    if generator is None:
        generator = secrets.randbits(32)
    if is_torch(generator) and hasattr(generator, "initial_seed"):
        torch = sys.modules["torch"]
        return to_array(torch.randn(tuple(shape), generator=generator, device=generator.device))
    if isinstance(generator, bool) or not isinstance(generator, int | np.integer):
        raise UsageError(
            f"generator is a {type(generator).__name__}; give a seed, a torch.Generator, or noise as latents"
        )
    try:
        return torch_randn(shape, int(generator))
    except ValueError as error:
        raise UsageError(f"{error}; give another seed, or noise as latents") from error


def as_format(pixels: np.ndarray, output_type: str) -> Any:
    """Return pixels ``[n, channels, height, width]`` in [0, 1] as ``pil``, ``np`` (channels last) or ``pt``."""
    if output_type == "pt":
        return to_tensor(pixels)
    pictures = np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))
    return pictures if output_type == "np" else [to_image(picture) for picture in pictures]


def to_tensor(array: np.ndarray) -> Any:
    """Return an array as a torch tensor.

    Raises:
        UsageError: torch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise UsageError("output_type 'pt' needs torch, which is not installed; use 'np' or 'pil'") from error
    return torch.from_numpy(array)
