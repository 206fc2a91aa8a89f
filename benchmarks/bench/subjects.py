"""What a worker measures: one program of a bundle, or the model in torch. Free of torch where the program is."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from benchmarks.bench.failures import NotMeasuredError
from benchmarks.bench.inputs import TIMING_SEED, encodes, given_of, latent_shape
from benchmarks.bench.specs import ProgramSpec, TorchSpec
from benchmarks.bench.stopwatch import Stopwatch
from engines.backends import runner_for
from engines.onnxrt.runner import OnnxRuntimeRunner
from engines.program import Program
from export.bundle import open_bundle


class Subject(Protocol):
    """One thing to measure, loaded.

    Attributes:
        label: what runs it: backend, device, threads.
        batch: images a call.
        device_seconds: of the last call of :meth:`loop` on the device itself, where there is one beside the CPU.
        graph_seconds: of it inside graphs, where there are graphs whose launches wait.
    """

    label: str
    batch: int
    device_seconds: float | None
    graph_seconds: float | None

    def loop(self) -> np.ndarray:
        """Run the denoising loop on the timing seed's noise; returns the final latents ``[B, C, H, W]``."""

    def pipeline(self) -> np.ndarray:
        """The same with what comes before and after: classes or prompts to images."""

    def steps(self) -> list[float]:
        """Run the loop and return the seconds of each step."""

    def made(self, start: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Return latents and images of the batch at ``start`` of ``count``, fewer in the last one.

        Latents are float32 ``[n, C, H, W]``, images float32 ``[n, height, width, channels]`` in [0, 1], None where
        there is no decoder.
        """

    def macs(self) -> int | None:
        """Return the multiply-accumulates of one trajectory and one row of the batch, where they must be counted."""

    def close(self) -> None:
        """Let go of everything."""


class ProgramSubject:
    """A bundle's program."""

    def __init__(self, spec: ProgramSpec) -> None:
        self.spec = spec
        bundle = open_bundle(Path(spec.folder))
        runner = runner_for(bundle, spec.backend, spec.threads)
        self._stopwatch = Stopwatch(runner) if isinstance(runner, OnnxRuntimeRunner) else None
        self.program = Program(bundle, self._stopwatch or runner)
        self.program.__enter__()
        self.label, self.batch = self.program.runner.label, latent_shape(self.program.record)[0]
        self.device_seconds: float | None = None
        self.graph_seconds: float | None = None
        self._noise = self.program.noise(self.batch, TIMING_SEED)
        self._conditions = self._conditions_of(0, self.batch)

    def loop(self) -> np.ndarray:
        if self._stopwatch is None:
            return self.program.denoise(self._noise, self._conditions)
        self._stopwatch.seconds = 0.0
        latents = self.program.denoise(self._noise, self._conditions)
        self.graph_seconds = self._stopwatch.seconds
        return latents

    def pipeline(self) -> np.ndarray:
        if not encodes(self.program):
            raise NotMeasuredError("holds no text encoder")
        conditions = self.program.conditions(given_of(self.program, self.batch))
        return self.program.decode(self.program.denoise(self._noise, conditions))

    def steps(self) -> list[float]:
        marks = [time.perf_counter()]
        self.program.denoise(self._noise, self._conditions, lambda step, epsilon: marks.append(time.perf_counter()))
        return np.diff(marks).tolist()

    def made(self, start: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray | None]:
        chosen = np.arange(start, start + self.batch).clip(max=count - 1)
        kept = min(self.batch, count - start)
        noise = self.program.noise(count, seed)[chosen]
        latents = self.program.denoise(noise, self._conditions_of(start, count))
        if self.program.record.decoder is None:
            return latents[:kept], None
        return latents[:kept], self.program.decode(latents)[:kept].transpose(0, 2, 3, 1)

    def macs(self) -> None:
        return None

    def close(self) -> None:
        self.program.__exit__(None, None, None)

    def _conditions_of(self, start: int, count: int) -> dict[str, np.ndarray]:
        if files := self.spec.conditions:
            with np.load(Path(files[start // self.batch % len(files)]), allow_pickle=False) as held:
                return {name: held[name] for name in held.files}
        given = given_of(self.program, count)
        return self.program.conditions(
            [given[index] for index in np.arange(start, start + self.batch).clip(max=count - 1)]
        )


def subject_of(spec: ProgramSpec | TorchSpec) -> Subject:
    """Load what a spec says."""
    if isinstance(spec, ProgramSpec):
        return ProgramSubject(spec)
    from benchmarks.bench.torch_subject import TorchSubject

    subject: Any = TorchSubject(spec)
    return subject
