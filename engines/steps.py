"""The loop over steps, one step at a time, so that callbacks, progress bars and other loops can look in between.

Any number of images go in lockstep, with an execution context for every batch of the bundle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from engines.context import ExecutionContext
from engines.context_pool import ContextPool
from engines.finite import NotFinite, check_finite
from engines.sizes import batches_of


class Steps:
    """The execution contexts of some images; entering it takes them from the pool, and leaving gives them back.

    Args:
        pool: of a bundle whose engines are loaded.
        shape: of the latents of all images, ``[n, C, H, W]``.
        conditions: the graph inputs of all of them, with guidance those of the unconditional pass first: ``2 n`` rows.
    """

    def __init__(self, pool: ContextPool, shape: Sequence[int], conditions: Mapping[str, np.ndarray]) -> None:
        self.bundle, self.record, self.count = pool.bundle, pool.bundle.record, shape[0]
        self._image, self._batches = tuple(shape[1:]), batches_of(self.record, shape[0])
        self._conditions, self._pool = conditions, pool
        self._contexts: list[ExecutionContext] = []

    def __enter__(self) -> Steps:
        try:
            for images in self._batches:
                context = self._pool.take((len(images), *self._image))
                self._contexts.append(context)
                context.begin(rows_of(self._conditions, images, self.count))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        while self._contexts:
            self._pool.give(self._contexts.pop())

    @property
    def can_replay(self) -> bool:
        """Whether all steps can be had as one launch."""
        return all(context.replay for context in self._contexts)

    def replay(self) -> None:
        """Run all steps, by one launch per context."""
        for context in self._contexts:
            assert context.replay is not None
            context.replay()
            self._pool.launches += 1

    def write(self, step: int, latent: np.ndarray) -> None:
        """Set x before a step, ``[n, C, H, W]``: in graphs that hold the solver unscaled, else as ε is computed."""
        for context, images in zip(self._contexts, self._batches, strict=True):
            context.runner.write(context.slots[self.record.steps[step].latent], latent[images])

    def set_condition(self, step: int, name: str, value: np.ndarray) -> None:
        """Set a condition of one step, where it may change from step to step: rows as those of all conditions."""
        for context, images in zip(self._contexts, self._batches, strict=True):
            context.set_condition(step, name, rows_of({name: value}, images, self.count)[name])

    def launch(self, step: int) -> None:
        """Compute a step; one without launches has the ε of the step before it."""
        for context in self._contexts:
            for launch in context.steps[step]:
                launch()
            self._pool.launches += len(context.steps[step])

    def start(self, step: int) -> None:
        """Compute a step that is a trajectory's first, whatever comes before it in others."""
        if step == 0:
            self.launch(step)
            return
        for context in self._contexts:
            for launch in context.start(step):
                launch()
            self._pool.launches += 1

    def epsilon(self, step: int) -> np.ndarray:
        """Return ε after a step, float32 ``[n, C, H, W]``, a copy.

        Raises:
            NotFinite: it holds infinity or NaN.
        """
        values = self._read(self.record.steps[step].epsilon)
        return check_finite(self.record, values, f"ε of step {step + 1} of {len(self.record.steps)}")

    def result(self) -> np.ndarray:
        """Return x after the last step, float32 ``[n, C, H, W]``, of graphs that hold the solver.

        Raises:
            NotFinite: it holds infinity or NaN.
        """
        return check_finite(self.record, self._read(self.record.solver.result), "the final latent")

    def again(self) -> Steps:
        """Return the steps of the same images, in contexts of their own."""
        return Steps(self._pool, (self.count, *self._image), self._conditions)

    def _read(self, slot: int) -> np.ndarray:
        values = [context.runner.read(context.slots[slot]) for context in self._contexts]
        return np.concatenate(values)[: self.count].astype(np.float32, copy=False)


class Walk:
    """The solver on top. Where it is in the graphs, x is what they compute; else the host sums it up.

    ``noise`` is that of all images, float32 ``[n, C, H, W]``, or ``[n, 1 + draws, C, H, W]`` where the sampler draws.

    Sums are in float64, over the whole history, from the sampler's table: their terms cancel. ``watched`` says whether
    :attr:`latent` will be read in between where graphs hold the solver. Then it is summed up here too, and differs
    from a graph's own x by rounding. Values that stop being finite raise NotFinite, with the step.

    Attributes:
        step: the next one; after the last, how many there are.
        first: of the trajectory.
    """

    first = 0

    def __init__(self, steps: Steps, noise: np.ndarray, watched: bool = True) -> None:
        tables = steps.bundle.tables
        self._rows, self._scale = tables["solver.rows"], tables["solver.input_scale"]
        self.steps, self.step = steps, 0
        self._in_graphs = steps.record.solver.kind == "graph"
        self._sums = watched or not self._in_graphs
        draws = steps.record.solver.draws
        drawn = np.moveaxis(noise, 1, 0) if draws else noise[None]
        self._known = 1 + draws  # of what rows combine, before the first step
        self._history = np.zeros((self._rows.shape[1] if self._sums else 1, *drawn.shape[1:]))
        self._history[: self._known] = drawn
        if self._in_graphs:
            steps.write(0, noise * self._rows[0, 0])

    def advance(self) -> None:
        """Do the next step."""
        step = self.step
        if not self._in_graphs and self.steps.record.steps[step].launches:
            self.steps.write(step, self._scale[step] * self._sum(step))
        self.steps.launch(step)
        if self._sums:
            self._history[self._known + step] = self.steps.epsilon(step)
        self.step = step + 1

    def finish(self) -> None:
        """Do all steps by one launch, where :attr:`Steps.can_replay` says so."""
        self.steps.replay()
        self.step = len(self.steps.record.steps)

    @property
    def latent(self) -> np.ndarray:
        """x before :attr:`step`, float32 ``[n, C, H, W]``, an array of its own."""
        if self._in_graphs and self.step == len(self.steps.record.steps):
            try:
                return self.steps.result()
            except NotFinite:
                self._raise_at_the_step()
                raise
        return self._sum(self.step).astype(np.float32)

    def _raise_at_the_step(self) -> None:
        """Go the same way again and look at every ε: graphs that hold the solver hand out the last x alone."""
        with self.steps.again() as steps:
            walk = Walk(steps, self._history[0])
            while walk.step < len(steps.record.steps):
                walk.advance()

    def _sum(self, step: int) -> np.ndarray:
        known = self._known + step
        history = self._history[:known].reshape(known, -1)
        return (self._rows[step, :known] @ history).reshape(self._history.shape[1:])


def rows_of(conditions: Mapping[str, np.ndarray], images: np.ndarray, count: int) -> dict[str, np.ndarray]:
    """Return the rows of some of ``count`` images, by their numbers: of the unconditional and the conditional pass."""
    return {
        name: np.concatenate([value[start + images] for start in range(0, len(value), count)])
        for name, value in conditions.items()
    }
