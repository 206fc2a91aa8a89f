"""A workload made small, so that all that a GPU is to do can be gone through on a CPU first; it measures nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from benchmarks.bench.suite import Workload
from dipgo.model.models import ARCHITECTURES

_UNET: dict[str, Any] = {"layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 2, "sample_size": 8}
_TRANSFORMER: dict[str, Any] = {"num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 8}
SMALL: dict[str, dict[str, Any]] = {
    "sd-1.5": _UNET | {"block_out_channels": [8, 8, 16, 16], "cross_attention_dim": 16},
    "sdxl": _UNET
    | {"block_out_channels": [8, 16, 16], "transformer_layers_per_block": [1, 1, 2], "cross_attention_dim": 16}
    | {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 16 + 6 * 8},
    "dit-xl-2": _TRANSFORMER,
    "pixart-alpha": _TRANSFORMER | {"cross_attention_dim": 16, "caption_channels": 16},
}
"""What changes in the denoiser's configuration, by architecture; the blocks stay those of the large one."""
_VAE = {"block_out_channels": [8] * 4, "norm_num_groups": 4, "layers_per_block": 1}


def small(workload: Workload, folder: Path) -> Workload:
    """Return the same workload on a small model, written below ``folder``, in fewer steps where they are free."""
    target = folder / workload.model
    if not target.is_dir():
        shutil.copytree(ARCHITECTURES / workload.model, target)
        for part, changes in (("unet", SMALL[workload.model]), ("transformer", SMALL[workload.model]), ("vae", _VAE)):
            file = target / part / "config.json"
            if file.is_file():
                file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    steps = workload.steps if workload.subnet else 10
    return workload.model_copy(update={"model": str(target), "steps": steps})
