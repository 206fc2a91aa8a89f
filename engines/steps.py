"""The loop over steps, one step at a time, so that callbacks, progress bars and other loops can look in between.

Any number of images go in lockstep, a lane for every batch of the bundle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType

import numpy as np

from engines.context import Lane
from engines.context_pool import Lanes
from engines.sizes import batches_of


class Steps:
    """The lanes of some images; a context manager, which takes their lanes and gives them back.

    Args:
        lanes: of a bundle whose engines are loaded.
        shape: of the latents of all images, ``[n, C, H, W]``.
        conditions: the graph inputs of all of them, with guidance the unconditional half first: ``2 n`` rows.
    """

    def __init__(self, lanes: Lanes, shape: Sequence[int], conditions: Mapping[str, np.ndarray]) -> None:
        self.bundle, self.record, self.count = lanes.bundle, lanes.bundle.record, shape[0]
        self._image, self._batches = tuple(shape[1:]), batches_of(self.record, shape[0])
        self._conditions = conditions
        self._from = lanes
        self._lanes: list[Lane] = []

    def __enter__(self) -> Steps:
        try:
            for chosen in self._batches:
                lane = self._from.take((len(chosen), *self._image))
                self._lanes.append(lane)
                lane.begin(rows_of(self._conditions, chosen, self.count))
        except BaseException:
            self._give_back()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._give_back()

    @property
    def whole(self) -> bool:
        """Whether all steps can be had as one launch."""
        return all(lane.whole for lane in self._lanes)

    def run_whole(self) -> None:
        """Run all steps by one launch a lane."""
        for lane in self._lanes:
            assert lane.whole is not None
            lane.whole()
            self._from.launches += 1

    def write(self, step: int, latent: np.ndarray) -> None:
        """Set x before a step, ``[n, C, H, W]``: in graphs that hold the solver unscaled, else as ε is computed."""
        for lane, chosen in zip(self._lanes, self._batches, strict=True):
            lane.runner.write(lane.slots[self.record.steps[step].latent], latent[chosen])

    def launch(self, step: int) -> None:
        """Compute a step; one without launches has the ε of the step before it."""
        for lane in self._lanes:
            for launch in lane.steps[step]:
                launch()
            self._from.launches += len(lane.steps[step])

    def epsilon(self, step: int) -> np.ndarray:
        """Return ε after a step, float32 ``[n, C, H, W]``, a copy."""
        return self._read(self.record.steps[step].epsilon)

    def result(self) -> np.ndarray:
        """Return x after the last step, float32 ``[n, C, H, W]``, of graphs that hold the solver."""
        return self._read(self.record.solver.result)

    def _read(self, slot: int) -> np.ndarray:
        values = [lane.runner.read(lane.slots[slot]) for lane in self._lanes]
        return np.concatenate(values)[: self.count].astype(np.float32, copy=False)

    def _give_back(self) -> None:
        while self._lanes:
            self._from.give(self._lanes.pop())


class Walk:
    """The solver on top. Where it is in the graphs, x is what they compute; else the host sums it up.

    Sums are in float64, over the whole history, from the sampler's table: their terms cancel. ``watched`` says whether
    :attr:`latent` will be asked for in between where graphs hold the solver. Then it is summed up here too, and
    differs from a graph's own x by rounding.
    """

    def __init__(self, steps: Steps, noise: np.ndarray, watched: bool = True) -> None:
        tables = steps.bundle.tables
        self._rows, self._scale = tables["solver.rows"], tables["solver.input_scale"]
        self.steps, self.done = steps, 0
        self._in_graphs = steps.record.solver.kind == "graph"
        self._sums = watched or not self._in_graphs
        self._history = np.zeros((len(self._rows) if self._sums else 1, *noise.shape))
        self._history[0] = noise
        if self._in_graphs:
            steps.write(0, noise * self._rows[0, 0])

    def advance(self) -> None:
        """Do the next step."""
        step = self.done
        if not self._in_graphs and self.steps.record.steps[step].launches:
            self.steps.write(step, self._scale[step] * self._sum(step))
        self.steps.launch(step)
        if self._sums:
            self._history[step + 1] = self.steps.epsilon(step)
        self.done = step + 1

    def finish(self) -> None:
        """Do all steps by one launch, where :attr:`Steps.whole` says that this can be."""
        self.steps.run_whole()
        self.done = len(self.steps.record.steps)

    @property
    def latent(self) -> np.ndarray:
        """x after the steps done so far, float32 ``[n, C, H, W]``, an array of its own."""
        if self._in_graphs and self.done == len(self.steps.record.steps):
            return self.steps.result()
        return self._sum(self.done).astype(np.float32)

    def _sum(self, done: int) -> np.ndarray:
        known = self._history[: done + 1].reshape(done + 1, -1)
        return (self._rows[done, : done + 1] @ known).reshape(self._history.shape[1:])


def rows_of(conditions: Mapping[str, np.ndarray], chosen: np.ndarray, count: int) -> dict[str, np.ndarray]:
    """Return the rows of some of ``count`` images, in either half of guidance."""
    return {
        name: np.concatenate([value[start + chosen] for start in range(0, len(value), count)])
        for name, value in conditions.items()
    }
