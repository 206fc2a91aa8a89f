"""What a worker measures and what all programs are given to work on. Free of torch where the program is."""

from __future__ import annotations

import abc
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from benchmarks.failures import NotMeasuredError
from dipgo.base.dtypes import Dtype
from dipgo.base.records import Record
from engines.backend import Buffer, Launch, Runner
from engines.backends import runner_for
from engines.guidance import Guidance, fixed_conditions
from engines.onnxrt.runner import OnnxRuntimeRunner
from engines.program import Program
from export.bundle import open_bundle
from export.records.bundle import BundleRecord
from export.records.conditioning import ConditioningRecord

PARITY_SEED = 0
TIMING_SEED = 1
IMAGE_SEED = 7_000_000  # the search draws from other seeds

PROMPTS = (
    "a red fox in the snow",
    "Two dogs, sleeping in the rain",
    "an oil painting of a harbour at dusk",
    "a bowl of oranges on a wooden table, soft light",
)

Inputs = list[Any]
"""Classes or prompts, one an image."""


def inputs_of(program: Program, count: int) -> Inputs:
    """Return ``count`` classes or prompts for a program, see :func:`inputs_for`."""
    return inputs_for(program.record.conditioning, count)


def inputs_for(conditioning: ConditioningRecord, count: int) -> Inputs:
    """Return ``count`` classes, or prompts where these condition, cycling through the model's own if it has any."""
    some: Inputs = conditioning.prompts or list(PROMPTS)
    if conditioning.kind == "class":
        some = sorted(set(conditioning.labels.values())) or [0]
    return [some[index % len(some)] for index in range(count)]


def latent_shape(record: BundleRecord) -> list[int]:
    """Return the latent's shape ``[B, C, H, W]``; sizes that are chosen at run time as the bundle was made best for."""
    return [side if isinstance(side, int) else record.axes[side].opt for side in record.latent.shape]


def save(file: str | Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays into an npz file, which :func:`numpy.load` reads without unpickling anything."""
    entries: dict[str, Any] = dict(arrays)
    np.savez(file, **entries)


def step_seconds(program: Program, noise: np.ndarray, conditions: Mapping[str, np.ndarray]) -> list[float]:
    """Run the loop and return the seconds of each step."""
    marks = [time.perf_counter()]
    program.denoise(noise, conditions, lambda step, epsilon: marks.append(time.perf_counter()))
    return np.diff(marks).tolist()


def encodes(program: Program) -> bool:
    """Whether a program makes its conditions from classes or prompts by itself."""
    conditioning = program.record.conditioning
    return conditioning.kind != "prompt" or conditioning.encoder is not None


class ProgramSpec(Record):
    """A program of a bundle in a backend.

    ``conditions`` are files with the conditions of one batch each, in turn, for a program that cannot make its own.
    """

    kind: Literal["program"] = "program"
    folder: str
    program: int = Field(default=0, ge=0, description="which program of the bundle")
    backend: str
    threads: int | None = None
    conditions: list[str] = Field(default_factory=list)
    guidance: float | None = Field(default=None, description="scale, where it is not the SubNet's own")


class TorchSpec(Record):
    """The model that a bundle was compiled from, whole, in torch: its diffusers denoiser, scheduler and VAE.

    ``technique`` is what is applied to it, see :mod:`benchmarks.bench.techniques`.
    """

    kind: Literal["torch"] = "torch"
    bundle: str
    model: str | None = None
    technique: str
    threads: int | None = None


Spec = Annotated[ProgramSpec | TorchSpec, Field(discriminator="kind")]


class Subject(abc.ABC):
    """One thing to measure, loaded.

    Attributes:
        label: what runs it: backend, device, threads.
        batch: images a call.
        device_seconds: of the last call of :meth:`loop` on the device itself, where there is one beside the CPU.
        graph_seconds: of it inside graphs, where there are graphs whose launches wait.
    """

    label: str
    batch: int
    device_seconds: float | None = None
    graph_seconds: float | None = None

    @abc.abstractmethod
    def loop(self) -> np.ndarray:
        """Run the denoising loop on the timing seed's noise; returns the final latents ``[B, C, H, W]``."""

    @abc.abstractmethod
    def pipeline(self) -> np.ndarray:
        """The same with what comes before and after: classes or prompts to images."""

    @abc.abstractmethod
    def steps(self) -> list[float]:
        """Run the loop and return the seconds of each step."""

    @abc.abstractmethod
    def generate(self, start: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Return latents and images of the batch at ``start`` of ``count``, fewer in the last one.

        Latents are float32 ``[n, C, H, W]``, images float32 ``[n, height, width, channels]`` in [0, 1], None where
        there is no decoder.
        """

    def macs(self) -> int | None:
        """Return the multiply-accumulates of one trajectory and one row of the batch, where they must be counted."""
        return None

    def close(self) -> None:  # noqa: B027 - what holds nothing leaves it
        """Let go of everything."""


class Stopwatch:
    """A runner like the one it is put around, but for the time it adds up.

    Attributes:
        seconds: inside launches so far, prologues with them.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def __enter__(self) -> Stopwatch:
        self._runner.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._runner.__exit__(*error)

    def bind(self, file: str, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Launch:
        launch = self._runner.bind(file, inputs, outputs)

        def timed() -> None:
            begin = time.perf_counter()
            launch()
            self.seconds += time.perf_counter() - begin

        return timed


class ProgramSubject(Subject):
    """A bundle's program."""

    def __init__(self, spec: ProgramSpec) -> None:
        self.spec = spec
        bundle = open_bundle(Path(spec.folder))
        runner = runner_for(bundle, spec.backend, spec.threads)
        self._stopwatch = Stopwatch(runner) if isinstance(runner, OnnxRuntimeRunner) else None
        self._bundle = Program(bundle, self._stopwatch or runner)
        self._bundle.__enter__()
        self.program = self._bundle.programs[spec.program]
        self.label, self.batch = self.program.runner.label, latent_shape(self.program.record)[0]
        self._noise = self.program.noise(self.batch, TIMING_SEED)
        self._conditions = self._conditions_of(0, self.batch)

    def loop(self) -> np.ndarray:
        before = self._stopwatch.seconds if self._stopwatch else 0.0
        latents = self.program.denoise(self._noise, self._conditions)
        if self._stopwatch:
            self.graph_seconds = self._stopwatch.seconds - before
        return latents

    def pipeline(self) -> np.ndarray:
        if not encodes(self.program):
            raise NotMeasuredError("holds no text encoder")
        conditions = self.program.conditions(inputs_of(self.program, self.batch))
        return self.program.decode(self.program.denoise(self._noise, conditions))

    def steps(self) -> list[float]:
        return step_seconds(self.program, self._noise, self._conditions)

    def generate(self, start: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray | None]:
        chosen = np.arange(start, start + self.batch).clip(max=count - 1)
        size = min(self.batch, count - start)
        noise = self.program.noise(count, seed)[chosen]
        latents = self.program.denoise(noise, self._conditions_of(start, count))
        if self.program.record.decoder is None:
            return latents[:size], None
        return latents[:size], self.program.decode(latents)[:size].transpose(0, 2, 3, 1)

    def close(self) -> None:
        self._bundle.__exit__(None, None, None)

    def _conditions_of(self, start: int, count: int) -> dict[str, np.ndarray]:
        made, record = self._usual_conditions(start, count), self.program.record
        scales = record.conditioning.guidance.inputs if record.conditioning.guidance else {}
        if self.spec.guidance is None or not scales:
            return made
        scaled = fixed_conditions(record, len(next(iter(made.values()))), Guidance(self.spec.guidance))
        return made | {name: scaled[name] for name in scales}

    def _usual_conditions(self, start: int, count: int) -> dict[str, np.ndarray]:
        if files := self.spec.conditions:
            kinds = {each.name: Dtype(each.dtype).numpy for each in self.program.record.conditioning.inputs}
            with np.load(Path(files[start // self.batch % len(files)]), allow_pickle=False) as archive:
                read = {name: archive[name] for name in archive.files}
            # An archive knows bfloat16 as so many bytes alone.
            return {name: value.view(kinds[name]) if value.dtype.kind == "V" else value for name, value in read.items()}
        inputs = inputs_of(self.program, count)
        return self.program.conditions(
            [inputs[index] for index in np.arange(start, start + self.batch).clip(max=count - 1)]
        )


def subject_of(spec: ProgramSpec | TorchSpec) -> Subject:
    """Load what a spec says."""
    if isinstance(spec, ProgramSpec):
        return ProgramSubject(spec)
    from benchmarks.bench.torch_subject import TorchSubject

    return TorchSubject(spec)
