"""What a table of searches judges on: its noise, the full trajectory's images, and the converged ones."""

from __future__ import annotations

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.bench.quality import classified, image_psnr, is_digits, psnr
from benchmarks.bench.reference import as_images
from benchmarks.bench.reference import converged as converged_task
from benchmarks.bench.subjects import IMAGE_SEED
from benchmarks.studies.search_record import CONVERGED_STEPS, Cell
from dipgo.eager.trajectory import Batch
from dipgo.schedule.subnet import SubNet
from dipgo.searching.task import Task

CHUNK = 32


class Judge:
    """Holds the noise, the full trajectory's images and the converged ones."""

    def __init__(self, task: Task, images: int, converged: int) -> None:
        self.task = task
        self._tasks = {task.trace.sites: task}
        self.batches = [task.sampling.draw(CHUNK, IMAGE_SEED + number) for number in range(-(-images // CHUNK))]
        self.reference = self.full(task)
        self.labels = [label for batch in self.batches for label in _labels(batch)]
        long = -(-converged // CHUNK)
        self.converged = self.full(converged_task(task, CONVERGED_STEPS), long) if converged else None

    def full(self, task: Task, batches: int | None = None) -> np.ndarray:
        """Return images of the full model under ``task``'s sampler, ``[n, height, width, channels]`` in [0, 1]."""
        shown = tqdm(self.batches[:batches], desc=f"full, {task.sampler.steps} steps", leave=False)
        latents = (task.trajectory.full(batch.noise, batch.conditions)[-1] for batch in shown)
        return np.concatenate([self._images(latent) for latent in latents])

    def on_sites_of(self, subnet: SubNet) -> Task:
        """Return the task on a SubNet's sites, which may be of another granularity than the one given."""
        if subnet.sites not in self._tasks:
            self._tasks[subnet.sites] = self.task.with_sites(",".join(site.name for site in subnet.sites))
        return self._tasks[subnet.sites]

    def images_of(self, subnet: SubNet) -> np.ndarray:
        """Return the images of a SubNet."""
        trajectory, backups = self.on_sites_of(subnet).trajectory, subnet.schedule.tensors()
        with torch.no_grad():
            latents = (trajectory.gated(b.noise, b.conditions, subnet.gates, backups)[-1] for b in self.batches)
            return np.concatenate([self._images(latent) for latent in latents])

    def cell(self, row: str, budget: float, ratio: float, images: np.ndarray, **more: object) -> Cell:
        close = None
        if self.converged is not None:
            close = psnr(images[: len(self.converged)], self.converged)
        each = image_psnr(images, self.reference)
        return Cell(
            row=row,
            budget=budget,
            macs_ratio=round(ratio, 4),
            psnr_db=psnr(images, self.reference),
            image_psnr_db=float(each.mean()),
            each_psnr_db=each.round(3).tolist(),
            converged_db=close,
            class_accuracy=self.accuracy(images),
            **more,
        )

    def accuracy(self, images: np.ndarray) -> float | None:
        return float(classified(images, self.labels).mean()) if is_digits(self.task.model.name, images) else None

    def _images(self, latent: torch.Tensor) -> np.ndarray:
        with torch.no_grad():
            return as_images(self.task.decode(latent)).numpy()


def _labels(batch: Batch) -> list[int]:
    labels = batch.conditions.get("class_labels")
    return [0] * len(batch.noise) if labels is None else labels[-len(batch.noise) :].tolist()
