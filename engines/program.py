"""The program of a bundle, executed: the loop over steps, the cache slots, the solver. Backend-agnostic, torch-free."""

from __future__ import annotations

import queue
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from dipgo.errors import UsageError
from engines.lane import Lane
from engines.noise import torch_randn
from engines.onnxrt.runner import OnnxRuntimeRunner
from export.bundle import Bundle, open_bundle


class Program:
    """A bundle ready to run; a context manager that holds its engines.

    The state of a trajectory lives in a lane that one call of :meth:`denoise` has for itself and that every
    trajectory overwrites from its first step on: calls cannot leak into each other, in one thread or several.

    Attributes:
        launches: step graphs launched since the program was made.
    """

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        self.bundle = bundle
        self.record = bundle.record
        self.runner = OnnxRuntimeRunner(bundle, threads)
        solver = self.record.solver
        self._rows = np.array(solver.rows)  # float64, as the history is: the sums cancel
        scaled = self._rows[:-1] * np.array(solver.input_scale)[:, None]
        self._inputs = [np.ascontiguousarray(row[: index + 1]) for index, row in enumerate(scaled)]
        self._lanes: queue.SimpleQueue[Lane] = queue.SimpleQueue()
        self.launches = 0

    def __enter__(self) -> Program:
        self.runner.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lanes = queue.SimpleQueue()
        self.runner.__exit__(kind, error, trace)

    @property
    def batch(self) -> int:
        return self.record.latent.shape[0]

    def noise(self, count: int, seed: int) -> np.ndarray:
        """Return initial noise ``[count, C, H, W]``, the same that diffusers draws from this seed on the CPU.

        Raises:
            UsageError: a seed that torch's noise cannot be rebuilt from.
        """
        try:
            return torch_randn([count, *self.record.latent.shape[1:]], seed)
        except ValueError as error:
            raise UsageError(f"{error}; give another seed") from error

    def class_of(self, label: str) -> int:
        """Return the class that ``label`` names, by its name or its number.

        Raises:
            UsageError: the model has no such class.
        """
        labels = self.record.conditioning.labels
        if label in labels:
            return labels[label]
        if label.isdecimal() and (not labels or int(label) in labels.values()):
            return int(label)
        known = ", ".join(list(labels)[:10]) + (", …" if len(labels) > 10 else "")
        raise UsageError(f"class '{label}' is unknown to {self.record.model.name}; it has: {known}")

    def class_conditions(self, classes: Sequence[int]) -> dict[str, np.ndarray]:
        """Return the graph inputs for one batch of classes.

        Raises:
            UsageError: the bundle is not conditioned on classes, or has no such class.
        """
        conditioning = self.record.conditioning
        if conditioning.kind != "class":
            raise UsageError(f"{self.bundle.folder}: conditioned by {conditioning.kind}, not by class")
        known = sorted(set(conditioning.labels.values()))
        unknown = [label for label in classes if known and label not in known]
        if unknown:
            raise UsageError(
                f"class {unknown[0]} is unknown to {self.record.model.name}; it has {known[0]} to {known[-1]}"
            )
        rows = [conditioning.null_class] * len(classes) * conditioning.guided + list(classes)
        return {conditioning.inputs[0].name: np.array(rows, np.int64)}

    def denoise(
        self,
        noise: np.ndarray,
        conditions: Mapping[str, np.ndarray],
        after_step: Callable[[int, np.ndarray], None] | None = None,
    ) -> np.ndarray:
        """Run the trajectory of one batch.

        Args:
            noise: initial noise, float32 of the bundle's latent shape.
            conditions: the graph inputs of the prompt or class.
            after_step: called with the step and its ε (a view that the next step overwrites).

        Returns:
            The final latent, float32 ``[B, C, H, W]``.
        """
        expected = tuple(self.record.latent.shape)
        if noise.shape != expected:
            raise UsageError(f"noise is {list(noise.shape)}, the bundle was compiled for {list(expected)}")
        lane = self._take_lane()
        try:
            lane.begin(conditions)
            history = np.zeros((len(self._rows), noise.size))  # the solver's basis: noise, then every ε; float64
            history[0] = noise.reshape(-1)
            flat_epsilon = lane.epsilon.reshape(-1)
            for index, launch in enumerate(lane.launches):
                if launch is not None:
                    np.matmul(self._inputs[index], history[: index + 1], out=lane.scratch)
                    lane.latent.reshape(-1)[...] = lane.scratch
                    launch()
                    self.launches += 1
                history[index + 1] = flat_epsilon
                if after_step:
                    after_step(index, lane.epsilon)
        finally:
            self._lanes.put(lane)
        return (self._rows[-1] @ history).astype(np.float32).reshape(expected)

    def generate(
        self, classes: Sequence[int], seed: int, progress: Callable[[Sequence[int]], Any] = iter
    ) -> np.ndarray:
        """Generate one image a class: pixels ``[n, height, width, channels]`` in [0, 1], float32.

        The images are those of the diffusers pipeline called with the same classes and
        ``generator=torch.Generator().manual_seed(seed)``. A last batch that is not full is filled up and cut.
        """
        noise = self.noise(len(classes), seed)
        pixels = []
        for start in progress(range(0, len(classes), self.batch)):
            chosen = np.arange(start, start + self.batch).clip(max=len(classes) - 1)
            latent = self.denoise(noise[chosen], self.class_conditions([classes[k] for k in chosen]))
            pixels.append(self.runner.decode(latent))
        return np.concatenate(pixels)[: len(classes)].transpose(0, 2, 3, 1)

    def _take_lane(self) -> Lane:
        try:
            return self._lanes.get_nowait()
        except queue.Empty:
            return Lane(self.bundle, self.runner)


def load(folder: str | Path, threads: int | None = None) -> Program:
    """Open a bundle, check its files, and return its program (enter it to load the engines)."""
    return Program(open_bundle(Path(folder)), threads)
