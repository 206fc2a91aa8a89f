"""Images of a text-to-image pipeline by diffusers alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def draw(pipe: Any, prompts: Sequence[str], seed: int = 0, batch: int = 50, **options: Any) -> torch.Tensor:
    """Return one image a prompt, float32 ``[n, 3, height, width]`` in [-1, 1] on the CPU.

    Image k depends on its prompt and on ``seed + k`` alone, not on the batch. ``options`` are the pipeline's own.
    """
    pipe.set_progress_bar_config(disable=True)
    images = []
    for start in range(0, len(prompts), batch):
        texts = list(prompts[start : start + batch])
        noise = [torch.Generator().manual_seed(seed + start + k) for k in range(len(texts))]
        images.append(pipe(texts, generator=noise, output_type="pt", **options).images)
    return torch.cat(images).float().cpu() * 2 - 1
