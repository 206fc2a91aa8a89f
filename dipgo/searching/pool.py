"""Batches that a search learns on: drawn once, with the full trajectory beside each, and kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from dipgo.eager.sampling import Batch, select
from dipgo.searching.distributed import ALONE, Processes
from dipgo.searching.task import Task


class Batches(Protocol):
    """Batches by number, each with the latents of its full trajectory after 0, 1, … calls."""

    def __getitem__(self, number: int, /) -> tuple[Batch, list[torch.Tensor]]: ...


class Pool:
    """Batches of noise and conditions with their full trajectories; batch k is always the same.

    A pool of ``size`` images is gone through in order, then again and again in new orders; its full trajectories are
    computed once, ``chunk`` images at a time, when first needed. ``size = 0`` draws afresh at every iteration and
    keeps one chunk.

    With several processes the pool is one for all: each takes its own columns of it, ``batch`` of them, so that
    together they see what one process with the joint batch sees.
    """

    def __init__(
        self, task: Task, size: int, batch: int, seed: int, processes: Processes = ALONE, chunk: int = 32
    ) -> None:
        self.task, self.batch, self.seed, self.processes = task, batch, seed, processes
        self.columns = batch * processes.count
        self.depth = max(1, chunk // self.columns)  # batches in a chunk
        chunks = -(-size // (self.depth * self.columns))
        self.rows = chunks * self.depth  # batches in the pool, 0 without end
        self._chunks: dict[int, list[list[_Image]]] = {}
        self._orders: tuple[int, np.ndarray] = (-1, np.empty(0))

    def __getitem__(self, number: int) -> tuple[Batch, list[torch.Tensor]]:
        epoch, place = divmod(number, self.rows) if self.rows else (0, number)
        own = range(self.processes.rank * self.batch, (self.processes.rank + 1) * self.batch)
        images = []
        for index, column in enumerate(own):
            row = self._order(epoch)[place, column] if epoch else place
            images.append(self._chunk(int(row) // self.depth)[int(row) % self.depth][index])
        latents = [torch.cat(parts) for parts in zip(*(image.latents for image in images), strict=True)]
        return _join([image.batch for image in images]), latents

    def _order(self, epoch: int) -> np.ndarray:
        """Return the row that each column takes at each place of an epoch, int ``[rows, columns]``."""
        if self._orders[0] != epoch:
            generator = np.random.default_rng([self.seed, epoch])
            rows = np.tile(np.arange(self.rows)[:, None], self.columns)
            self._orders = (epoch, generator.permuted(rows, axis=0))
        return self._orders[1]

    def _chunk(self, number: int) -> list[list[_Image]]:
        """Return this process's images of a chunk, ``[depth][batch]``."""
        if number not in self._chunks:
            if not self.rows:
                self._chunks.clear()
            seed = int(np.random.SeedSequence([self.seed, number]).generate_state(1, np.uint64)[0] >> np.uint64(1))
            images_of_all = self.task.draw(self.depth * self.columns, seed)
            places = torch.arange(self.depth * self.columns).view(self.depth, self.columns)
            first = self.processes.rank * self.batch
            own = select(images_of_all, places[:, first : first + self.batch].flatten())
            latents = self.task.trajectory.full(own.noise, own.conditions)
            images = [
                _Image(select(own, torch.tensor([index])), [latent[index : index + 1] for latent in latents])
                for index in range(len(own.noise))
            ]
            self._chunks[number] = [images[row : row + self.batch] for row in range(0, len(images), self.batch)]
        return self._chunks[number]


@dataclass(frozen=True)
class _Image:
    batch: Batch
    latents: list[torch.Tensor]


def _join(batches: list[Batch]) -> Batch:
    """Stack batches of one image each; the conditions of each pass of guidance stay together."""
    conditions = {
        name: torch.stack([batch.conditions[name] for batch in batches], dim=1).flatten(0, 1)
        for name in batches[0].conditions
    }
    return Batch(torch.cat([batch.noise for batch in batches]), conditions)
