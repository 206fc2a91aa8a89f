"""A lane: the memory of one trajectory under way, with every launch bound to it.

Slots and the values of the prologues have fixed addresses for as long as the lane lives, so a step is launches and no
copies. A program hands each call a lane of its own.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from engines.onnxrt.runner import Launch, OnnxRuntimeRunner
from export.bundle import Bundle, LaunchRecord, PrologueRecord, TensorRecord


class Lane:
    """Buffers and bound launches for one trajectory at a time.

    Attributes:
        slots: what launches hand to each other.
        conditions: the graph inputs of the prompt or class.
        steps: the launches of every step.
    """

    def __init__(self, bundle: Bundle, runner: OnnxRuntimeRunner) -> None:
        record = bundle.record
        self.record, self.tables = record, bundle.tables
        self.slots = [np.zeros(slot.shape, slot.dtype) for slot in record.slots]
        self.conditions = {tensor.name: _empty(tensor) for tensor in record.conditioning.inputs}
        self._hoisted: dict[str, np.ndarray] = {}  # [steps, …] each
        self._prologues = [self._prologue(runner, prologue) for prologue in record.prologues]
        self.steps: list[list[Launch]] = [
            [self._bind(runner, index, launch) for launch in step.launches] for index, step in enumerate(record.steps)
        ]

    def begin(self, conditions: Mapping[str, np.ndarray]) -> None:
        """Take the conditions of a new trajectory and run the prologues."""
        for name, array in self.conditions.items():
            array[...] = conditions[name]
        for launch, copies in self._prologues:
            for target, source in copies:
                target[...] = source
            launch()

    def _prologue(
        self, runner: OnnxRuntimeRunner, prologue: PrologueRecord
    ) -> tuple[Launch, list[tuple[np.ndarray, np.ndarray]]]:
        """Bind a prologue; returns its launch and what to copy where before it: a batch of all steps holds it often."""
        inputs = {tensor.name: _empty(tensor) for tensor in prologue.inputs}
        outputs = {tensor.name: _empty(tensor) for tensor in prologue.outputs}
        steps = len(self.record.steps) if prologue.kind == "steps" else 1
        copies = []
        for name, array in inputs.items():
            by_step = array.reshape(steps, -1, *array.shape[1:])
            if name in prologue.rows:
                by_step[...] = self.tables[prologue.rows[name].tensor][:, None]
            elif name == "timestep":
                by_step[...] = np.array([step.timestep for step in self.record.steps])[:, None]
            else:
                copies.append((by_step, self.conditions[name] if name in self.conditions else self._hoisted[name]))
        for name, array in outputs.items():
            by_step = array.reshape(steps, -1, *array.shape[1:])
            self._hoisted[name] = np.broadcast_to(by_step, (len(self.record.steps), *by_step.shape[1:]))
        return runner.bind(prologue.file, inputs, outputs), copies

    def _bind(self, runner: OnnxRuntimeRunner, index: int, launch: LaunchRecord) -> Launch:
        graph = self.record.graphs[launch.graph]
        inputs: dict[str, np.ndarray] = {}
        for tensor in graph.inputs:
            name = tensor.name
            if name in launch.reads:
                inputs[name] = self.slots[launch.reads[name]]
            elif name in graph.rows:
                row = graph.rows[name].read(self.tables, index, tensor.shape)
                inputs[name] = np.ascontiguousarray(row, tensor.dtype)
            elif name == "timestep":
                inputs[name] = np.full(tensor.shape, self.record.steps[index].timestep, tensor.dtype)
            elif name in self.conditions:
                inputs[name] = self.conditions[name]
            else:
                inputs[name] = self._hoisted[name][index]
        return runner.bind(graph.file, inputs, {name: self.slots[slot] for name, slot in launch.writes.items()})


def _empty(tensor: TensorRecord) -> np.ndarray:
    return np.empty(tensor.shape, tensor.dtype)
