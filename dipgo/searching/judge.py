"""The judge: candidates compared on noise that nothing is learned from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from dipgo.eager.trajectory import Batch, select
from dipgo.searching.losses import psnr
from dipgo.searching.run_folder import Run
from dipgo.searching.task import Task


@dataclass(frozen=True)
class Candidate:
    """Gates, what skipped sites serve, the judge's verdict in dB, and whether this is a fixed policy."""

    name: str
    gates: np.ndarray
    weights: Mapping[str, np.ndarray]
    psnr: float
    fixed: bool = False

    @property
    def terms(self) -> int:
        return terms_of(self.weights)


class Judge:
    """Compares gates and backups by the mean of the decoded images' PSNR to those of the full trajectory.

    That is what the ``psnr`` loss descends. Over all pixels together, a few images that part ways with the full
    trajectory's would decide. With several processes the main one judges for all, so that all choose alike. ``chunk``
    images are computed at once.
    """

    def __init__(self, task: Task, count: int, seed: int, run: Run, chunk: int = 32) -> None:
        self.task, self.run = task, run
        drawn = task.sampling.draw(count, seed)
        self.batches: list[Batch] = [select(drawn, rows) for rows in torch.arange(count).split(chunk)]

    def __call__(self, name: str, gates: np.ndarray, weights: Mapping[str, np.ndarray]) -> Candidate:
        return Candidate(name, gates, weights, self.run.processes.from_main(lambda: self.psnr(gates, weights)))

    def psnr(self, gates: np.ndarray, weights: Mapping[str, np.ndarray]) -> float:
        """Return the mean of the images' PSNR in dB; for the main process alone."""
        return self.psnrs(gates, weights).mean().item()

    def psnrs(self, gates: np.ndarray, weights: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return each image's PSNR in dB; for the main process alone."""
        tensors = {key: torch.from_numpy(np.asarray(array)) for key, array in weights.items()}
        found = []
        for batch, reference in zip(self.batches, self.references, strict=True):
            with torch.no_grad():
                latents = self.task.trajectory.gated(batch.noise, batch.conditions, gates, tensors, terms_of(weights))
            found.append(psnr(self._images(latents), reference).cpu().numpy())
        return np.concatenate(found)

    @cached_property
    def references(self) -> list[torch.Tensor]:
        return [self._images(self.task.trajectory.full(batch.noise, batch.conditions)) for batch in self.batches]

    def _images(self, latents: list[torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            return self.task.decode(latents[-1])


def terms_of(weights: Mapping[str, np.ndarray]) -> int:
    """Return K: how many computed outputs the backups combine."""
    return next((array.shape[1] for array in weights.values()), 1)
