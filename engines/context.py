"""An execution context: the memory of one trajectory under way, with every launch bound to it.

It is for one choice of sizes, where a bundle leaves some to the run. Slots and the values of the prologues have fixed
addresses for as long as the context lives, so a step is launches and no copies. A program hands each call a context
of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np

from engines.backend import Buffer, Launch, Runner
from export.axes import shape_at
from export.bundle import Bundle, LaunchRecord, PrologueRecord, TensorRecord


class ExecutionContext:
    """Buffers and bound launches for one trajectory at a time.

    ``sizes`` are the values of the bundle's axes.

    Attributes:
        slots: what launches hand to each other.
        conditions: the graph inputs of the prompt or class.
        steps: the launches of every step.
        replay: all of them as one launch, where the backend can and the solver is in the graphs; else None.
    """

    def __init__(self, bundle: Bundle, runner: Runner, sizes: Mapping[str, int]) -> None:
        record = bundle.record
        self.sizes = dict(sizes)
        self.record, self.tables, self.runner = record, bundle.tables, runner
        self.slots = [runner.zeros(shape_at(slot.shape, sizes), slot.dtype) for slot in record.slots]
        self.conditions = {tensor.name: self._empty(tensor) for tensor in record.conditioning.inputs}
        self._matrices: dict[str, Buffer] = {}  # of low-rank branches, as far as graphs read them
        self._written: Mapping[str, np.ndarray] | None = None
        # What prologues compute, by step: ``[steps, …]``, or one row that is the same for all steps.
        self._prologue_values: dict[str, Buffer] = {}
        self._prologues = [self._prologue(prologue) for prologue in record.prologues]
        self.steps: list[list[Launch]] = [
            [self._bind(index, launch) for launch in step.launches] for index, step in enumerate(record.steps)
        ]
        launches = [launch for step in self.steps for launch in step]
        self.replay = runner.capture(launches) if record.solver.kind == "graph" else None

    def adapt(self, matrices: Mapping[str, np.ndarray]) -> None:
        """Take the matrices of low-rank branches, before a trajectory begins."""
        if matrices is not self._written:
            for name, buffer in self._matrices.items():
                self.runner.write(buffer, matrices[name])
            self._written = matrices

    def begin(self, conditions: Mapping[str, np.ndarray]) -> None:
        """Take the conditions of a new trajectory and run the prologues."""
        for name, buffer in self.conditions.items():
            self.runner.write(buffer, conditions[name])
        for launch, copies in self._prologues:
            for copy in copies:
                copy()
            launch()

    def _prologue(self, prologue: PrologueRecord) -> tuple[Launch, list[Launch]]:
        """Bind a prologue; returns its launch and the copies before it: a batch of all steps holds an input often."""
        inputs = {}
        for tensor in prologue.inputs:
            matrix = self._matrix(tensor)
            inputs[tensor.name] = self._empty(tensor) if matrix is None else matrix
        outputs = {tensor.name: self._empty(tensor) for tensor in prologue.outputs}
        steps = len(self.record.steps) if prologue.kind == "steps" else 1
        copies: list[Launch] = []
        for name, buffer in inputs.items():
            if name in self._matrices:
                continue
            by_step = buffer.reshape(steps, -1, *buffer.shape[1:])
            if name in prologue.rows:
                self._fill(by_step, self.tables[prologue.rows[name].tensor])
            elif name == "timestep":
                self._fill(by_step, np.array([step.timestep for step in self.record.steps])[:steps])
            elif name in self.conditions:
                copies += [partial(self.runner.copy, by_step[step], self.conditions[name]) for step in range(steps)]
            else:
                sources = [self._value(name, step) for step in range(steps)]
                copies += [partial(self.runner.copy, by_step[step], source) for step, source in enumerate(sources)]
        for name, buffer in outputs.items():
            self._prologue_values[name] = buffer.reshape(steps, -1, *buffer.shape[1:])
        return self.runner.bind(prologue.file, inputs, outputs), copies

    def _fill(self, by_step: Buffer, rows: np.ndarray) -> None:
        """Write one row per step, ``[steps, …]``, over all images of the step."""
        self.runner.write(by_step, np.broadcast_to(rows[:, None], tuple(by_step.shape)))

    def _value(self, name: str, step: int) -> Buffer:
        rows = self._prologue_values[name]
        return rows[step if rows.shape[0] > 1 else 0]

    def _bind(self, index: int, launch: LaunchRecord) -> Launch:
        graph = self.record.graphs[launch.graph]
        inputs: dict[str, Buffer] = {}
        for tensor in graph.inputs:
            name = tensor.name
            if name in launch.reads:
                inputs[name] = self.slots[launch.reads[name]]
            elif name in graph.rows:
                inputs[name] = self._constant(tensor, graph.rows[name].read(self.tables, index, self._shape(tensor)))
            elif name == "timestep":
                inputs[name] = self._constant(tensor, np.full(self._shape(tensor), self.record.steps[index].timestep))
            elif name in self.conditions:
                inputs[name] = self.conditions[name]
            elif (matrix := self._matrix(tensor)) is not None:
                inputs[name] = matrix
            else:
                inputs[name] = self._value(name, index)
        return self.runner.bind(graph.file, inputs, {name: self.slots[slot] for name, slot in launch.writes.items()})

    def _matrix(self, tensor: TensorRecord) -> Buffer | None:
        """Return the memory of an input that holds matrices of low-rank branches; None for others."""
        adapters = self.record.adapters
        if adapters is None or all(tensor.name != each.name for each in adapters.inputs):
            return None
        if tensor.name not in self._matrices:
            self._matrices[tensor.name] = self._empty(tensor)
        return self._matrices[tensor.name]

    def _constant(self, tensor: TensorRecord, values: np.ndarray) -> Buffer:
        buffer = self._empty(tensor)
        self.runner.write(buffer, values)
        return buffer

    def _empty(self, tensor: TensorRecord) -> Buffer:
        return self.runner.zeros(self._shape(tensor), tensor.dtype)

    def _shape(self, tensor: TensorRecord) -> tuple[int, ...]:
        return shape_at(tensor.shape, self.sizes)
