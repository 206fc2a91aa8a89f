"""Small pipelines with random SubNets, compiled once, for the tests of what stands in for a pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from dipgo.eager.gating import gated
from dipgo.model.observed.request import picture
from dipgo.model.sampler import make_scheduler
from dipgo.schedule.subnet import SubNet
from tests import models, zoo

STEPS = 4
GUIDANCE = 4.0
REUSES = ("dit", "unconditional")  # their skipped sites serve the last output as it is, so a step may be silent


@dataclass(frozen=True)
class Compiled:
    """A diffusers pipeline, a random SubNet whose step 2 computes nothing, and its bundle for one image a call.

    ``arguments`` are those that make the pipeline do what the bundle was compiled for.
    """

    pipe: Any
    component: str
    subnet: SubNet
    folder: Path
    arguments: dict[str, Any]

    def call(self, pipe: Any, seed: int = 3, **changes: Any) -> Any:
        """Call the diffusers pipeline, or what stands for it; returns the images."""
        generator = torch.Generator().manual_seed(seed)
        return pipe(**{**self.arguments, "generator": generator, "output_type": "np", **changes}).images

    @contextmanager
    def gates(self, guided: bool = True) -> Iterator[Any]:
        with gated(getattr(self.pipe, self.component), self.subnet, guided=guided):
            yield self.pipe

    def expected(self, guided: bool = True, **changes: Any) -> Any:
        """Return the images of the diffusers pipeline under the gates."""
        with self.gates(guided) as pipe:
            return self.call(pipe, **changes)


@cache
def compiled(
    kind: str,
    whole: bool = True,
    keep: float = 0.5,
    steps: int = STEPS,
    image: bool = False,
    name: str | None = None,
) -> Compiled:
    task = zoo.task(kind, steps, name, sites="branch" if kind == "sdxl" else None)
    if name:
        task.pipe.scheduler = make_scheduler(name, task.pipe.scheduler)
    backups = {} if kind in REUSES else {"terms": 2, "channels": 2}
    subnet = models.random_subnet(task.trace, task.sampler, seed=0, keep=keep, **backups)
    if keep < 1:
        subnet.gates[2] = False
    traced = zoo.trace(kind, "branch" if kind == "sdxl" else None, open_guidance=True)
    folder = zoo.bundle(traced, task.sampler, subnet, whole=whole, image=image)
    subjects = {"dit": {"class_labels": [0, 1, 2]}, "unconditional": {"batch_size": 3}}
    arguments = subjects.get(kind, {"prompt": ["a red fox", "two dogs", "a harbour"]}) | {"num_inference_steps": steps}
    scale = task.model.family.scale_argument
    arguments |= {} if kind == "unconditional" else {scale: task.guidance_scale}
    arguments |= {"negative_prompt": ""} if scale == "true_cfg_scale" else {}
    arguments |= dict(zip(("height", "width"), zoo.PIXELS.get(kind, ()), strict=False))
    arguments |= {"clean_caption": False} if kind == "pixart" else {}
    if kind == "sd-inpaint":
        pictures = [picture(what, (16, 16)) for what in ("a fox", "a mask")]
        arguments |= {"prompt": "a red fox", "image": pictures[0], "mask_image": pictures[1].convert("1").convert("L")}
    return Compiled(task.pipe, task.model.family.component, subnet, folder, arguments)
