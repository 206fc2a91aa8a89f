"""A program's launches in order, each held against ONNX Runtime on the same inputs, its sites against torch.

Torch runs the gated model beside it, step by step on the same noise. Up to the first launch that diverges both have
the same latents and cached outputs, so what diverges there first is where the fault lies: values that differ from ONNX
Runtime's, whose optimisations are off, are the backend's, and values in which ONNX Runtime differs from torch are the
export's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.bench.parity import trajectory_of
from benchmarks.bench.reference import cast_pipeline, conditions_as_arrays, conditions_in, decode_latents, subnet_of
from benchmarks.bench.subjects import PARITY_SEED, encodes, inputs_of
from benchmarks.debug.differences import Difference, Values, compare
from benchmarks.debug.graphs import Reference
from benchmarks.debug.watch import Watched
from dipgo.base.progress import Report
from dipgo.eager.trajectory import Trajectory
from dipgo.graph.outputs import take_apart
from engines.backends import runner_for
from engines.program import Program
from engines.sizes import batches_of
from engines.steps import Steps, Walk
from export.bundle import Bundle
from export.onnx.denoiser_graph import feature_name


@dataclass(frozen=True)
class Launch:
    """One launch, and how it differs.

    Attributes:
        step: of the loop, from 0; None before and after it.
        file: the graph's.
        backend: its outputs against ONNX Runtime's.
        sites: what ONNX Runtime computes, against torch, by tensor in the order in which torch computes.
    """

    step: int | None
    file: str
    backend: dict[str, Difference]
    sites: dict[str, Difference]

    @property
    def against(self) -> Literal["backend", "torch"] | None:
        """What the launch differs from: the backend from ONNX Runtime, else that from torch."""
        if not all(difference.holds for difference in self.backend.values()):
            return "backend"
        return None if all(difference.holds for difference in self.sites.values()) else "torch"


@dataclass(frozen=True)
class Walked:
    """The launches up to the first that diverges; of it what went in, and torch's values."""

    launches: list[Launch]
    inputs: Values
    torch: Values

    @property
    def diverges(self) -> bool:
        return bool(self.launches) and self.launches[-1].against is not None


class _Diverged(Exception):
    """The last launch diverges."""


class _Observer:
    """Compares launches as they happen."""

    def __init__(self, bundle: Bundle, tolerance: float) -> None:
        self._reference, self._tolerance = Reference(bundle), tolerance
        self.step: int | None = None
        self.launches: list[Launch] = []
        self.inputs: Values = {}
        self.torch: dict[str, np.ndarray] = {}

    def observe(self, file: str, inputs: Values, outputs: Values) -> None:
        expected = self._reference.run(file, inputs)
        backend = compare({name: expected[name] for name in outputs}, outputs, self._tolerance)
        self.inputs = inputs
        self.launches.append(Launch(self.step, file, backend, compare(self.torch, expected, self._tolerance)))
        if self.launches[-1].against:
            raise _Diverged


def walk(bundle: Bundle, pipe: Any, backend: str, tolerance: float, progress: Report) -> Walked:
    """Run one batch of a bundle's program in a backend up to the first launch that diverges.

    Args:
        pipe: the float32 pipeline that it was compiled from.
        tolerance: relative error of a tensor.
    """
    dtype = getattr(torch, bundle.record.dtype)
    pipe = pipe if dtype == torch.float32 else cast_pipeline(pipe, dtype)
    observer = _Observer(bundle, tolerance)
    program = Program(bundle, Watched(runner_for(bundle, backend), observer.observe))
    try:
        with program, torch.no_grad():
            _run(program, pipe, observer, progress)
    except _Diverged:
        pass
    return Walked(observer.launches, observer.inputs, observer.torch)


def _run(program: Program, pipe: Any, observer: _Observer, progress: Report) -> None:
    """Run torch, and after each of its steps the program's."""
    record, trajectory = program.record, trajectory_of(program, pipe)
    rows = batches_of(record, 1)[0]
    inputs = [inputs_of(program, 1)[row] for row in rows]
    noise = program.noise(1, PARITY_SEED)[rows]
    own = program.conditions(inputs) if encodes(program) else conditions_as_arrays(pipe, inputs, record)
    with Steps(program.contexts, noise.shape, own) as steps:
        walk = Walk(steps, noise)

        def advance(epsilon: torch.Tensor) -> None:
            observer.step = walk.step
            observer.torch["epsilon"] = epsilon.numpy()
            progress("debug: step by step", walk.step, len(record.steps), "")
            walk.advance()
            observer.torch.clear()

        with _seen(trajectory, observer.torch, advance):
            subnet = subnet_of(program.bundle)
            conditions = conditions_in(pipe, inputs, trajectory.guided.guided)
            latents = trajectory.gated(torch.from_numpy(noise), conditions, subnet.gates, subnet.schedule.tensors())
        observer.step = None
        if record.decoder:
            pixels = decode_latents(pipe, latents[-1]).permute(0, 3, 1, 2)
            observer.torch[record.decoder.output.name] = pixels.numpy()
            program.decode(walk.latent)


@contextmanager
def _seen(trajectory: Trajectory, values: dict[str, np.ndarray], after: Any) -> Iterator[None]:
    """While it lasts, put what sites hand on into ``values``, and call ``after`` with every ε."""

    def put(name: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            for number, tensor in enumerate(take_apart(output)[0]):
                values[feature_name(name, number)] = tensor.detach().numpy().copy()

        return hook

    denoiser = trajectory.guided.denoiser
    hooks = [denoiser.get_submodule(name).register_forward_hook(put(name)) for name in trajectory.names]
    hooks.append(trajectory.guided.register_forward_hook(lambda module, args, epsilon: after(epsilon)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
