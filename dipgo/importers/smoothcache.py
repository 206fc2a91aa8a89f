"""SmoothCache's schedules (Liu et al. 2024): JSON, ``{"attn1": [1, 0, …], "ff": […]}``, one list per layer type.

1 computes and 0 serves the last output, in every transformer block; ``"attn1-3"`` is for block 3 alone and goes before
``"attn1"``. The names ``attn`` and ``mlp``, of the original DiT code, are diffusers' ``attn1`` and ``ff``. A layer of
which the file says nothing is computed at every step.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dipgo.importers.published import Published, by_call, is_mask

if TYPE_CHECKING:
    from torch import nn

Key = tuple[str, str | None]

_KEY = re.compile(r"[a-zA-Z]\w*(-\d+)?")
_DIFFUSERS = {"attn": "attn1", "mlp": "ff"}


@dataclass(frozen=True)
class SmoothCache(Published):
    """Masks, bool ``[steps]``, by layer type and, where given, block: ``("ff", None)``, ``("ff", "3")``."""

    masks: Mapping[Key, np.ndarray]
    format = "SmoothCache"

    @property
    def steps(self) -> int:
        return len(next(iter(self.masks.values())))

    def sites(self, denoiser: nn.Module) -> str:
        return ",".join(self._keys(denoiser))

    def columns(
        self, names: Sequence[str], denoiser: nn.Module, timesteps: Sequence[float]
    ) -> Mapping[str, np.ndarray]:
        rows = {key: by_call(mask, timesteps, f"'{_text(key)}'") for key, mask in self.masks.items()}
        return {name: rows[key] for name, key in self._keys(denoiser).items()}

    def _keys(self, denoiser: nn.Module) -> dict[str, Key]:
        """Return the modules that the file speaks of (``….<block>.<layer type>``), each with its key."""
        modules: dict[str, Key] = {}
        used: set[Key] = set()
        for name, _ in denoiser.named_modules():
            block, layer = f".{name}".rsplit(".", 2)[-2:]
            keys = [key for key in ((layer, block), (layer, None)) if block.isdigit() and key in self.masks]
            if keys:
                modules[name] = keys[0]
                used.update(keys)
        idle = [key for key in self.masks if key not in used]
        if idle:
            raise ValueError(f"'{_text(idle[0])}' is no layer in the transformer blocks of {type(denoiser).__name__}")
        return modules


def read_smoothcache(document: Any) -> SmoothCache | None:
    """Read a schedule; None where the document is something else.

    Raises:
        ValueError: lists of different lengths, or two for the same layer.
    """
    if not isinstance(document, dict) or not document or not all(map(_KEY.fullmatch, document)):
        return None
    if not all(is_mask(value) for value in document.values()):
        return None
    masks = {}
    for key, value in document.items():
        layer, _, block = key.partition("-")
        named = (_DIFFUSERS.get(layer, layer), block or None)
        if named in masks:
            raise ValueError(f"'{key}' says again what another key says of {_text(named)}; leave one of them out")
        masks[named] = np.array(value, bool)
    lengths = {key: len(value) for key, value in document.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"its lists have different lengths: {', '.join(f'{k} {n}' for k, n in lengths.items())}"[:200])
    return SmoothCache(masks)


def _text(key: Key) -> str:
    return key[0] if key[1] is None else f"{key[0]}-{key[1]}"
