"""DiT (Peebles & Xie 2023): a transformer conditioned by class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from dipgo.model.families.family import Conditions, Family
from dipgo.model.sampler import tabulate

NULL_CLASS = 1000  # the label of the unconditional half that DiTPipeline hard-codes


def _encode(pipe: Any, labels: Sequence[int]) -> tuple[Conditions, Conditions]:
    conditional = torch.as_tensor(list(labels), dtype=torch.int64)
    return {"class_labels": torch.full_like(conditional, NULL_CLASS)}, {"class_labels": conditional}


def _call(denoiser: nn.Module, sample: torch.Tensor, timestep: torch.Tensor, given: Conditions) -> torch.Tensor:
    return denoiser(sample, timestep=timestep, class_labels=given["class_labels"], return_dict=False)[0]


def _labels(index: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, int]:
    """Return the pipeline's own names of classes, as DiTPipeline reads them, or their numbers where it has none."""
    numbered = (index.get("id2label") or {}).items()
    entries = {name.strip(): int(number) for number, names in numbered for name in names.split(",")}
    return dict(sorted(entries.items())) or {str(label): label for label in range(config["num_embeds_ada_norm"])}


DIT = Family(
    denoiser_class="DiTTransformer2DModel",
    pipelines=("DiTPipeline",),
    component="transformer",
    conditioned_by="class",
    sites={
        "block": ("transformer_blocks.*",),
        "branch": ("transformer_blocks.*",),
        "layer": ("transformer_blocks.*.attn1", "transformer_blocks.*.ff", "proj_out_2"),
    },
    granularity="layer",
    encode=_encode,
    example=lambda config, rows: {"class_labels": torch.zeros(rows, dtype=torch.int64)},
    call=_call,
    conditional_first=True,
    table=partial(tabulate, scales_noise=False, given={}),
    null_class=NULL_CLASS,
    labels=_labels,
)
