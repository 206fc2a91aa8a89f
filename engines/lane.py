"""A lane: the memory of one trajectory under way, with every launch bound to it.

Latent, ε, cache slots and the values of the prologues have fixed addresses for as long as the lane lives, so a step is
one launch and no copies. A program hands each call a lane of its own.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from engines.onnxrt.runner import Launch, OnnxRuntimeRunner
from export.bundle import Bundle, StepRecord, TensorRecord


class Lane:
    """Buffers and bound launches for one trajectory at a time.

    Attributes:
        latent, epsilon: what a step reads and writes, float32 ``[B, C, H, W]``.
        scratch: room for the latent before rounding, float64.
        launches: one a step; None where ε is the last ε.
    """

    def __init__(self, bundle: Bundle, runner: OnnxRuntimeRunner) -> None:
        record = bundle.record
        self.record = record
        self.latent = _empty(record.latent)
        self.epsilon = _empty(record.latent)
        self.scratch = np.empty(self.latent.size)
        self.conditions = {tensor.name: _empty(tensor) for tensor in record.conditioning.inputs}
        self.slots = [np.empty(slot.shape, slot.dtype) for slot in record.slots]
        self._prologues: list[tuple[Launch, dict[str, np.ndarray]]] = []
        self._hoisted: dict[str, np.ndarray] = {}  # [steps, …] each
        steps = len(record.steps)
        for prologue in record.prologues:
            inputs = {tensor.name: _empty(tensor) for tensor in prologue.inputs}
            outputs = {tensor.name: _empty(tensor) for tensor in prologue.outputs}
            self._prologues.append((runner.bind(prologue.file, inputs, outputs), inputs))
            if "timestep" in inputs:
                rows = len(inputs["timestep"]) // steps
                inputs["timestep"][...] = np.repeat([step.timestep for step in record.steps], rows)
            for name, array in outputs.items():
                by_step = array.reshape(steps, -1, *array.shape[1:]) if prologue.kind == "steps" else array[None]
                self._hoisted[name] = np.broadcast_to(by_step, (steps, *by_step.shape[1:]))
        self.launches = [self._bind(bundle, runner, index, step) for index, step in enumerate(record.steps)]

    def begin(self, conditions: Mapping[str, np.ndarray]) -> None:
        """Take the conditions of a new trajectory and run the prologues."""
        for name, array in self.conditions.items():
            array[...] = conditions[name]
        for launch, inputs in self._prologues:
            for name, array in inputs.items():
                if name != "timestep":
                    array.reshape(-1, *self.conditions[name].shape)[...] = self.conditions[name]
            launch()

    def _bind(self, bundle: Bundle, runner: OnnxRuntimeRunner, index: int, step: StepRecord) -> Launch | None:
        if step.graph is None:
            return None
        graph = self.record.graphs[step.graph]
        inputs: dict[str, np.ndarray] = {}
        for tensor in graph.inputs:
            name = tensor.name
            if name == "latent":
                inputs[name] = self.latent
            elif name == "timestep":
                inputs[name] = np.full(tensor.shape, step.timestep, tensor.dtype)
            elif name in self.conditions:
                inputs[name] = self.conditions[name]
            elif name in self._hoisted:
                inputs[name] = self._hoisted[name][index]
            elif name in graph.coefficients:
                entry = graph.coefficients[name]
                row = bundle.backups[entry.tensor][index, entry.term]
                inputs[name] = np.ascontiguousarray(row.reshape(tensor.shape), tensor.dtype)
            else:
                inputs[name] = self.slots[step.reads[name]]
        outputs = {"epsilon": self.epsilon, **{name: self.slots[slot] for name, slot in step.writes.items()}}
        return runner.bind(graph.file, inputs, outputs)


def _empty(tensor: TensorRecord) -> np.ndarray:
    return np.empty(tensor.shape, tensor.dtype)
