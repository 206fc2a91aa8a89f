"""A judge of schedules: runs them in torch on held-out noise, beside the full trajectory and plain steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from benchmarks.bench.quality import Outputs, latents_as_images
from benchmarks.bench.reference import as_images
from dipgo.base.progress import Report, silent
from dipgo.eager.sampling import Batch
from dipgo.eager.trajectory import every_site
from dipgo.schedule.subnet import SubNet
from dipgo.searching.task import Task


class Judge:
    """Makes what is compared: outputs of the full model, of SubNets, of fewer steps, all from the same ``batches``."""

    def __init__(self, task: Task, batches: Sequence[Batch], progress: Report = silent) -> None:
        self.task, self.batches, self.progress = task, batches, progress

    @property
    def labels(self) -> list[int]:
        """The class of each image; 0 where classes do not condition."""
        return [label for batch in self.batches for label in _labels(batch)]

    def full(self, task: Task, batches: int | None = None) -> Outputs:
        """Return what the full model makes under ``task``'s sampler."""
        trajectory = task.trajectory
        return self._made(
            lambda batch: trajectory.full(batch.noise, batch.conditions), f"{trajectory.sampler.steps} steps", batches
        )

    def plain(self, steps: int) -> Outputs:
        """Return what the full model makes in so many steps of the task's solver."""
        return self.full(self.task.with_sampler(self.task.pipe.scheduler, steps))

    def gated(self, subnet: SubNet, name: str = "SubNet") -> Outputs:
        """Return what a SubNet makes; on other sites than the task's it takes more memory, and the same time."""
        trajectory, backups = self.task.trajectory, subnet.schedule.tensors()
        if subnet.sites != trajectory.sites:
            trajectory = replace(trajectory, sites=subnet.sites, live_sites=every_site)
        return self._made(
            lambda batch: trajectory.gated(batch.noise, batch.conditions, subnet.gates, backups), name, None
        )

    def _made(self, run: Callable[[Batch], list[torch.Tensor]], name: str, batches: int | None) -> Outputs:
        latents, images = [], []
        chosen = self.batches[:batches]
        for number, batch in enumerate(chosen):
            self.progress(f"judge {name}", number, len(chosen), "")
            with torch.no_grad():
                final = run(batch)[-1]
                latents.append(final.cpu().numpy())
                images.append(as_images(self.task.decode(final)).cpu().numpy())
        self.progress(f"judge {name}", len(chosen), len(chosen), "")
        joined = np.concatenate(latents)
        decodes = getattr(self.task.pipe, "vae", None) is not None
        return Outputs(joined, np.concatenate(images) if decodes else latents_as_images(joined))


def _labels(batch: Batch) -> list[int]:
    labels = batch.conditions.get("class_labels")
    return [0] * len(batch.noise) if labels is None else labels[-len(batch.noise) :].tolist()
