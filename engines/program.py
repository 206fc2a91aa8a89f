"""The program of a bundle, executed: the loop over steps, the cache slots, the solver. Backend-agnostic, torch-free."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from dipgo.errors import UsageError
from engines.noise import torch_randn
from engines.onnxrt.runner import OnnxRuntimeRunner
from export.bundle import Bundle, StepRecord, open_bundle


class Program:
    """A bundle ready to run; a context manager that holds its engines.

    All state of a trajectory lives in local variables of :meth:`denoise`: calls cannot leak into each other.
    """

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        self.bundle = bundle
        self.record = bundle.record
        self.runner = OnnxRuntimeRunner(bundle, threads)
        self._rows = np.array(self.record.solver.rows)
        self._coefficients = [self._coefficient_feeds(index, step) for index, step in enumerate(self.record.steps)]

    def __enter__(self) -> Program:
        self.runner.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.runner.__exit__(kind, error, trace)

    @property
    def batch(self) -> int:
        return self.record.latent.shape[0]

    def noise(self, count: int, seed: int) -> np.ndarray:
        """Return initial noise ``[count, C, H, W]``, the same that diffusers draws from this seed on the CPU."""
        return torch_randn([count, *self.record.latent.shape[1:]], seed)

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
            after_step: called with the step and its ε.

        Returns:
            The final latent, float32 ``[B, C, H, W]``.
        """
        expected = tuple(self.record.latent.shape)
        if noise.shape != expected:
            raise UsageError(f"noise is {list(noise.shape)}, the bundle was compiled for {list(expected)}")
        history = np.zeros((len(self._rows), noise.size))  # the solver's basis: noise, then every ε; float64
        history[0] = noise.reshape(-1)
        slots: dict[int, Any] = {}
        epsilon: np.ndarray | None = None
        for index, step in enumerate(self.record.steps):
            if step.graph is not None:
                latent = self._rows[index, : index + 1] @ history[: index + 1] * self.record.solver.input_scale[index]
                epsilon = self._launch(index, step, latent.astype(np.float32).reshape(expected), conditions, slots)
            assert epsilon is not None
            history[index + 1] = epsilon.reshape(-1)
            if after_step:
                after_step(index, epsilon)
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

    def _launch(
        self,
        index: int,
        step: StepRecord,
        latent: np.ndarray,
        conditions: Mapping[str, np.ndarray],
        slots: dict[int, Any],
    ) -> np.ndarray:
        assert step.graph is not None
        given = {"latent": latent, "timestep": np.array([step.timestep], np.float32), **conditions}
        wanted = {tensor.name for tensor in self.record.graphs[step.graph].inputs}
        feeds = {name: value for name, value in given.items() if name in wanted}
        feeds.update({name: slots[slot] for name, slot in step.reads.items()})
        feeds.update(self._coefficients[index])
        epsilon, *features = self.runner.launch(step.graph, feeds, ["epsilon", *step.writes])
        for slot, feature in zip(step.writes.values(), features, strict=True):
            slots[slot] = feature
        return epsilon

    def _coefficient_feeds(self, index: int, step: StepRecord) -> dict[str, np.ndarray]:
        if step.graph is None:
            return {}
        graph = self.record.graphs[step.graph]
        shapes = {tensor.name: tensor.shape for tensor in graph.inputs}
        return {
            name: np.ascontiguousarray(self.bundle.backups[entry.tensor][index, entry.term].reshape(shapes[name]))
            for name, entry in graph.coefficients.items()
        }


def load(folder: str | Path, threads: int | None = None) -> Program:
    """Open a bundle, check its files, and return its program (enter it to load the engines)."""
    return Program(open_bundle(Path(folder)), threads)
