"""The judge: schedules compared on noise that nothing is learned from."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch

from dipgo.eager.sampling import Batch, select
from dipgo.schedule.schedule import Schedule
from dipgo.searching.losses import psnr
from dipgo.searching.run_folder import Run
from dipgo.searching.task import Task


class Judge:
    """Compares schedules by the mean of the decoded images' PSNR to those of the full trajectory.

    That is what the ``psnr`` loss descends. Over all pixels together, a few images that part ways with the full
    trajectory's would decide. With several processes the main one judges for all, so that all choose alike. ``chunk``
    images are computed at once.
    """

    def __init__(self, task: Task, count: int, seed: int, run: Run, chunk: int = 32) -> None:
        self.task, self.run = task, run
        images = task.draw(count, seed)
        self.batches: list[Batch] = [select(images, rows) for rows in torch.arange(count).split(chunk)]

    def __call__(self, schedule: Schedule) -> float:
        """Return the mean of the images' PSNR in dB, the same in all processes."""
        return self.run.processes.from_main(lambda: self.psnr(schedule))

    def psnr(self, schedule: Schedule) -> float:
        """Return the mean of the images' PSNR in dB; for the main process alone."""
        return self.psnrs(schedule).mean().item()

    def psnrs(self, schedule: Schedule) -> np.ndarray:
        """Return each image's PSNR in dB; for the main process alone."""
        backups, scores = schedule.tensors(), []
        for batch, reference in zip(self.batches, self.references, strict=True):
            with torch.no_grad():
                latents = self.task.trajectory.gated(batch.noise, batch.conditions, schedule.gates, backups)
            scores.append(psnr(self._images(latents), reference).cpu().numpy())
        return np.concatenate(scores)

    @cached_property
    def references(self) -> list[torch.Tensor]:
        return [self._images(self.task.trajectory.full(batch.noise, batch.conditions)) for batch in self.batches]

    def _images(self, latents: list[torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            return self.task.decode(latents[-1])
