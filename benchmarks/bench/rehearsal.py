"""A workload made small, so that all that a GPU is to do can be gone through on a CPU first; it measures nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from benchmarks.bench.suite import Workload
from dipgo.model.models import ARCHITECTURES

_VAE = {"block_out_channels": [8] * 4, "norm_num_groups": 4, "layers_per_block": 1}


def small(workload: Workload, folder: Path) -> Workload:
    """Return the same workload on a small model, written below ``folder``; in ten steps if no SubNet needs more."""
    target = folder / workload.model
    if not target.is_dir():
        shutil.copytree(ARCHITECTURES / workload.model, target)
        for part, changes in (("unet", workload.small), ("transformer", workload.small), ("vae", _VAE)):
            file = target / part / "config.json"
            if file.is_file():
                file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    steps = workload.steps if workload.subnet else 10
    return workload.model_copy(update={"model": str(target), "steps": steps})
