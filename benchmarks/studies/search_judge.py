"""What a table of searches judges on: its noise, the full trajectory's images, and the converged ones."""

from __future__ import annotations

import numpy as np

from benchmarks.bench import judge
from benchmarks.bench.quality import SSIM_WINDOW, classified, image_psnr, image_ssim, is_digits, psnr
from benchmarks.bench.reference import converged as converged_task
from benchmarks.bench.subjects import IMAGE_SEED
from benchmarks.studies.search_record import CONVERGED_STEPS, Cell
from dipgo.schedule.subnet import SubNet
from dipgo.searching.task import Task

CHUNK = 32


class Judge(judge.Judge):
    """Holds the noise, the full trajectory's images and the converged ones."""

    def __init__(self, task: Task, images: int, converged: int) -> None:
        batches = [task.sampling.draw(CHUNK, IMAGE_SEED + number) for number in range(-(-images // CHUNK))]
        super().__init__(task, batches)
        self._tasks = {task.trace.sites: task}
        self.reference = self.images_in(task)
        long = -(-converged // CHUNK)
        self.converged = self.images_in(converged_task(task, CONVERGED_STEPS), long) if converged else None

    def images_in(self, task: Task, batches: int | None = None) -> np.ndarray:
        """Return images of the full model under ``task``'s sampler, ``[n, height, width, channels]`` in [0, 1]."""
        return self.full(task, batches).images

    def on_sites_of(self, subnet: SubNet) -> Task:
        """Return the task on a SubNet's sites, which may be of another granularity than the one given."""
        if subnet.sites not in self._tasks:
            self._tasks[subnet.sites] = self.task.with_sites(",".join(site.name for site in subnet.sites))
        return self._tasks[subnet.sites]

    def images_of(self, subnet: SubNet) -> np.ndarray:
        """Return the images of a SubNet."""
        return self.gated(subnet).images

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
            ssim=self.ssim(images),
            converged_db=close,
            class_accuracy=self.accuracy(images),
            **more,
        )

    def ssim(self, images: np.ndarray) -> float | None:
        """Return the mean structural similarity of the images; None of images that are too small for it."""
        large = min(images.shape[1:3]) >= SSIM_WINDOW
        return round(float(image_ssim(images, self.reference).mean()), 5) if large else None

    def accuracy(self, images: np.ndarray) -> float | None:
        return float(classified(images, self.labels).mean()) if is_digits(self.task.model.name, images) else None
