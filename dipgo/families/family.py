"""What a family of denoisers is."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

Conditions = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Family:
    """One class of denoiser.

    Attributes:
        denoiser_class: name of the diffusers model class.
        component: attribute of the pipeline that holds it.
        conditioned_by: ``"class"``, ``"prompt"`` or ``"nothing"``.
        sites: module name patterns by granularity (see :func:`dipgo.sites.site_names`); empty for a class without an
            entry, whose sites are given as patterns.
        granularity: the default granularity; None where there is none.
        encode: ``(pipeline, labels or prompts) -> conditions`` of the unconditional half, then the conditional.
        example: ``(denoiser config, rows) -> conditions`` of the right shapes and dtypes, for tracing; zeros wherever
            the values come from a text encoder.
        call: ``(denoiser, sample, timestep [B], conditions) -> model output``.
        scales_noise: whether the pipeline multiplies the initial noise by the scheduler's ``init_noise_sigma``.
        null_class: the label of the unconditional half, where classes condition.
        labels: ``pipeline -> {name: class}``.
    """

    denoiser_class: str
    component: str
    conditioned_by: Literal["class", "prompt", "nothing"]
    sites: Mapping[str, Sequence[str]]
    granularity: str | None
    encode: Callable[[Any, Sequence[Any]], tuple[Conditions, Conditions]]
    example: Callable[[Mapping[str, Any], int], Conditions]
    call: Callable[[nn.Module, torch.Tensor, torch.Tensor, Conditions], torch.Tensor]
    scales_noise: bool = True
    null_class: int | None = None
    labels: Callable[[Any], dict[str, int]] = field(default=lambda pipe: {})

    def conditions(self, pipe: Any, given: Sequence[Any]) -> tuple[Conditions, Conditions]:
        """Return the conditions of labels or prompts: the unconditional half, then the conditional, B rows each.

        A pipeline without its text encoder (random weights) gets stand-ins for embeddings: normal noise that depends
        on the prompt alone.
        """
        if self.conditioned_by != "prompt" or getattr(pipe, "text_encoder", None) is not None:
            return self.encode(pipe, given)
        config = getattr(pipe, self.component).config
        return self._stand_ins(config, [""] * len(given)), self._stand_ins(config, given)

    def _stand_ins(self, config: Mapping[str, Any], prompts: Sequence[Any]) -> Conditions:
        rows = []
        for prompt in prompts:
            generator = torch.Generator().manual_seed(zlib.crc32(str(prompt).encode()))
            rows.append(
                {
                    name: value if value.any() else torch.randn(value.shape, generator=generator)
                    for name, value in self.example(config, 1).items()
                }
            )
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def latent_size(config: Mapping[str, Any]) -> tuple[int, int]:
    """Return the height and width of a denoiser's latent."""
    size = config["sample_size"]
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return height, width
