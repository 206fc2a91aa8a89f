"""The program of a bundle, executed: the loop over steps, the cache slots, the solver. Backend-agnostic, torch-free."""

from __future__ import annotations

import queue
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from dipgo.errors import UsageError
from engines.backend import Runner
from engines.backends import DEFAULT, runner_for
from engines.lane import Lane
from engines.noise import torch_randn
from engines.text import TextEncoder
from export.bundle import Bundle, open_bundle

AfterStep = Callable[[int, np.ndarray], None]


class Program:
    """A bundle ready to run; a context manager that holds its engines.

    The state of a trajectory lives in a lane that one call of :meth:`denoise` has for itself and that every
    trajectory overwrites from its first step on: calls cannot leak into each other, in one thread or several.

    Attributes:
        launches: graphs of the loop launched since the program was made.
    """

    def __init__(self, bundle: Bundle, runner: Runner) -> None:
        self.bundle, self.runner = bundle, runner
        self.record = bundle.record
        encoder = self.record.conditioning.encoder
        self._text = TextEncoder(encoder, bundle.folder, runner.run) if encoder else None
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

    def conditions(self, given: Sequence[int] | Sequence[str], negative: str | None = None) -> dict[str, np.ndarray]:
        """Return the graph inputs for one batch of classes or prompts.

        ``negative`` is a prompt to stay away from; None is the pipeline's own way without one.

        Raises:
            UsageError: classes for a model of prompts or the reverse, or a class that the model lacks.
        """
        conditioning = self.record.conditioning
        if conditioning.kind == "nothing":
            return {}
        if conditioning.kind == "class":
            return self._class_conditions(given)
        if self._text is None:
            raise UsageError(f"{self.bundle.folder}: holds no text encoder; pass embeddings to denoise()")
        if not all(isinstance(prompt, str) for prompt in given):
            raise UsageError(f"{self.bundle.folder}: conditioned by prompts, not by classes; give --prompt")
        found = self._text([str(prompt) for prompt in given], negative, conditioning.guided)
        return {tensor.name: found[tensor.name].astype(tensor.dtype) for tensor in conditioning.inputs}

    def _class_conditions(self, classes: Sequence[Any]) -> dict[str, np.ndarray]:
        conditioning = self.record.conditioning
        if not all(isinstance(label, int | np.integer) for label in classes):
            raise UsageError(f"{self.bundle.folder}: conditioned by classes, not by prompts; give --class")
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
        after_step: AfterStep | None = None,
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
            loop = self._launches if self.record.solver.kind == "graph" else self._hosted
            loop(lane, noise, after_step)
            return self.runner.read(lane.slots[self.record.solver.result]).copy()
        finally:
            self._lanes.put(lane)

    def _launches(self, lane: Lane, noise: np.ndarray, after_step: AfterStep | None) -> None:
        """Run the loop where graphs hold the solver; as one launch, where nobody looks in between."""
        read, write = self.runner.read, self.runner.write
        write(lane.slots[self.record.steps[0].latent], noise * self.bundle.tables["solver.rows"][0, 0])
        if lane.whole and not after_step:
            lane.whole()
            self.launches += 1
            return
        for index, launches in enumerate(lane.steps):
            for launch in launches:
                launch()
            self.launches += len(launches)
            if after_step:
                after_step(index, read(lane.slots[self.record.steps[index].epsilon]))

    def _hosted(self, lane: Lane, noise: np.ndarray, after_step: AfterStep | None) -> None:
        """Run the loop with the solver between launches, in float64: its sums over the whole history cancel."""
        rows, scale = self.bundle.tables["solver.rows"], self.bundle.tables["solver.input_scale"]
        history = np.zeros((len(rows), noise.size))
        history[0] = noise.reshape(-1)
        read, write = self.runner.read, self.runner.write
        latent = lane.slots[self.record.solver.result]
        for index, launches in enumerate(lane.steps):
            if launches:
                x = scale[index] * (rows[index, : index + 1] @ history[: index + 1])
                write(latent, x.reshape(noise.shape))
                for launch in launches:
                    launch()
                self.launches += len(launches)
            epsilon = read(lane.slots[self.record.steps[index].epsilon])
            history[index + 1] = epsilon.reshape(-1)
            if after_step:
                after_step(index, epsilon)
        write(latent, (rows[-1] @ history).reshape(noise.shape))

    def decode(self, latent: np.ndarray) -> np.ndarray:
        """Run the VAE decoder: latent ``[B, C, H, W]`` to pixels ``[B, channels, height, width]`` in [0, 1].

        Raises:
            UsageError: a bundle without one.
        """
        decoder = self.record.decoder
        if decoder is None:
            raise UsageError(f"{self.bundle.folder}: holds no VAE decoder, only latents can be had from it")
        return self.runner.run(decoder.file, {decoder.input.name: latent})[decoder.output.name]

    def generate(
        self,
        given: Sequence[int] | Sequence[str],
        seed: int,
        progress: Callable[[Sequence[int]], Any] = iter,
        negative: str | None = None,
    ) -> np.ndarray:
        """Generate one image a class or prompt: pixels ``[n, height, width, channels]`` in [0, 1], float32.

        The images are those of the diffusers pipeline called with the same classes or prompts and
        ``generator=torch.Generator().manual_seed(seed)``. A last batch that is not full is filled up and cut.
        """
        noise = self.noise(len(given), seed)
        pixels = []
        for start in progress(range(0, len(given), self.batch)):
            chosen = np.arange(start, start + self.batch).clip(max=len(given) - 1)
            conditions = self.conditions([given[k] for k in chosen], negative)
            pixels.append(self.decode(self.denoise(noise[chosen], conditions)))
        return np.concatenate(pixels)[: len(given)].transpose(0, 2, 3, 1)

    def _take_lane(self) -> Lane:
        try:
            return self._lanes.get_nowait()
        except queue.Empty:
            return Lane(self.bundle, self.runner)


def load(folder: str | Path, threads: int | None = None, backend: str = DEFAULT) -> Program:
    """Open a bundle, check its files, and return its program (enter it to load the engines).

    Args:
        folder: the bundle.
        threads: for backends on the CPU; None leaves the choice to them.
        backend: see :data:`engines.backends.BACKENDS`.
    """
    bundle = open_bundle(Path(folder))
    return Program(bundle, runner_for(bundle, backend, threads))
