"""Bundles of a workload's programs, for the engines: from the very weights that torch has on the device."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.gpu.ground import Ground, Plan
from dipgo.graph.trace import Trace
from dipgo.model.models import Model, find_model
from export.compiler import write_bundle
from export.converted import Prepared, prepare


class Bundles:
    """Written when they are asked for, into a scratch folder; the model is saved and converted once a trace."""

    def __init__(self, ground: Ground, scratch: Path) -> None:
        self.ground, self.scratch = ground, scratch
        self._prepared: dict[int, Prepared] = {}

    def folder(self, program: str, plan: Plan) -> Path:
        """Return the bundle of a program, denoiser alone."""
        folder = self.scratch / f"bundle-{program}"
        if not folder.exists():
            prepared = self._converted(plan.trace)
            subnet = replace(plan.subnet, model=self.saved.identity())
            write_bundle(prepared, subnet, plan.sampler, folder)
        return folder

    @cached_property
    def saved(self) -> Model:
        """The model as a folder that holds the weights of the device."""
        ground, family = self.ground, self.ground.model.family
        folder = self.scratch / "model"
        shutil.copytree(ground.model.folder, folder)
        index = folder / "model_index.json"
        kept = ("_class_name", "scheduler", family.component)
        entries = json.loads(index.read_text())
        index.write_text(json.dumps({name: entries[name] for name in kept}))
        state = {name: value.detach().cpu().contiguous() for name, value in ground.denoiser.state_dict().items()}
        save_file(state, folder / family.component / "diffusion_pytorch_model.safetensors")
        return find_model(str(folder))

    def _converted(self, traced: Trace) -> Prepared:
        if id(traced) not in self._prepared:
            with torch.no_grad():
                own = replace(traced, model=self.saved)
                self._prepared[id(traced)] = prepare(own, len(self.ground.noise), whole=False)
        return self._prepared[id(traced)]
