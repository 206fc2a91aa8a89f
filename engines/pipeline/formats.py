"""Noise and images as users of diffusers pass and get them: seeds, generators, tensors, formats."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dipgo.base.errors import UsageError
from dipgo.base.layout import Layout
from engines.pipeline.images import to_image
from engines.pipeline.noise import Stream

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


def draw_noise(
    shape: Sequence[int],
    generator: Any,
    layout: Layout | None = None,
    draws: int = 0,
    latents: np.ndarray | None = None,
) -> np.ndarray:
    """Return the noise that diffusers draws with a generator, float32.

    Args:
        shape: of the latents, ``[n, …]``.
        generator: None for a random seed; an int, a seed on the CPU; a ``torch.Generator``, which moves on; a list of
            either, one an image.
        layout: how the initial noise is packed.
        draws: how often the sampler draws noise on its way.
        latents: what is to be there in the place of the initial noise.

    Returns:
        ``[n, …]``; where the sampler draws, ``[n, 1 + draws, …]``.

    Raises:
        UsageError: another kind of generator, a list of another length, or a seed that torch's noise cannot be
            rebuilt from.
    """
    if latents is not None and not draws:
        return latents
    draw = source_of(generator, shape[0])
    if latents is None:
        latents = draw((shape[0], *layout.before) if layout else shape)
        latents = np.ascontiguousarray(layout(latents)) if layout else latents
    return np.stack([latents, *(draw(shape) for _ in range(draws))], axis=1) if draws else latents


def source_of(generator: Any, count: int) -> Callable[[Sequence[int]], np.ndarray]:
    """Return what draws noise of a shape ``[n, …]`` from a generator of ``count`` images, again and again.

    Of generators for each image the first n draw one each. For errors see :func:`draw_noise`.
    """
    if isinstance(generator, list | tuple) and len(generator) == 1:
        generator = generator[0]
    if not isinstance(generator, list | tuple):
        return _source(generator)
    if len(generator) != count:
        raise UsageError(f"{len(generator)} generators for {count} images; give one an image, or one for all")
    own = [_source(each) for each in generator]
    return lambda shape: np.concatenate([draw((1, *shape[1:])) for draw in own[: shape[0]]])


def _source(generator: Any) -> Callable[[Sequence[int]], np.ndarray]:
    """Return what draws noise of a shape from one generator."""
    if is_torch(generator) and hasattr(generator, "initial_seed"):
        torch = sys.modules["torch"]
        return lambda shape: to_array(torch.randn(tuple(shape), generator=generator, device=generator.device))
    if generator is None:
        generator = secrets.randbits(32)
    if isinstance(generator, bool) or not isinstance(generator, int | np.integer):
        raise UsageError(
            f"generator is a {type(generator).__name__}; give a seed, a torch.Generator, or noise as latents"
        )

    def draw(shape: Sequence[int]) -> np.ndarray:
        try:
            return stream.randn(shape)
        except ValueError as error:
            raise UsageError(f"{error}; give another seed, or noise as latents") from error

    try:
        stream = Stream(int(generator))
    except ValueError as error:
        raise UsageError(f"{error}; give another seed, or noise as latents") from error
    return draw


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
