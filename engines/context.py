"""An execution context: the memory of one trajectory under way, with every launch bound to it.

It is for one choice of sizes, where a bundle leaves some to the run. Slots and the values of the prologues have fixed
addresses for as long as the context lives, so a step is launches and no copies. A program hands each call a context
of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np

from dipgo.base.control import STRENGTH
from engines.backend import Buffer, Launch, Runner
from export.axes import shape_at
from export.bundle import Bundle
from export.records.graphs import GraphRecord, PrologueRecord, TensorRecord

LATENT, EPSILON = "latent", "epsilon"


class ExecutionContext:
    """Buffers and bound launches for one trajectory at a time.

    ``sizes`` are the values of the bundle's axes.

    Attributes:
        slots: what launches hand to each other.
        conditions: the graph inputs of the prompt or class.
        by_step: those that may be others at each step.
        steps: the launches of every step.
        replay: all of them as one launch, where the backend can and the solver is in the graphs; else None.
    """

    def __init__(self, bundle: Bundle, runner: Runner, sizes: Mapping[str, int]) -> None:
        record = bundle.record
        self.sizes = dict(sizes)
        self.record, self.tables, self.runner = record, bundle.tables, runner
        self.slots = [runner.zeros(shape_at(slot.shape, sizes), slot.dtype) for slot in record.slots]
        inputs = {tensor.name: tensor for tensor in record.conditioning.inputs}
        changing = {name: inputs.pop(name) for name in {STRENGTH} & inputs.keys()}
        self.by_step = {name: [self._empty(tensor) for _ in record.steps] for name, tensor in changing.items()}
        self.conditions = {name: self._empty(tensor) for name, tensor in inputs.items()}
        self._matrices: dict[str, Buffer] = {}  # of low-rank branches, as far as graphs read them
        self._written: Mapping[str, np.ndarray] | None = None
        # What prologues compute, by step: ``[steps, …]``, or one row that is the same for all steps.
        self._prologue_values: dict[str, Buffer] = {}
        self._prologues = [self._prologue(prologue) for prologue in record.prologues]
        self.steps: list[list[Launch]] = [
            [self._bind(index, record.graphs[each.graph], each.reads, each.writes) for each in step.launches]
            for index, step in enumerate(record.steps)
        ]
        self._starts: dict[int, list[Launch]] = {}
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
        for name, buffers in self.by_step.items():
            for step in range(len(buffers)):
                value = conditions[name]
                self.set_condition(step, name, value[:, step] if value.ndim > len(buffers[step].shape) else value)
        for launch, copies in self._prologues:
            for copy in copies:
                copy()
            launch()

    def start(self, step: int) -> list[Launch]:
        """Return the launches of a trajectory's first step, which may be any; graphs are bound when first asked for.

        It computes all sites, and every slot that later steps read before they write it gets what it has computed: a
        backup that combines several past outputs finds that one in the place of each.
        """
        if step not in self._starts:
            record, here = self.record.start, self.record.steps[step]
            assert record is not None
            writes, copies = {EPSILON: here.epsilon}, list[Launch]()
            for slot, name in self.record.awaited[step].items():
                if name in writes:
                    copies.append(partial(self.runner.copy, self.slots[slot], self.slots[writes[name]]))
                else:
                    writes[name] = slot
            self._starts[step] = [self._bind(step, record.graph, {LATENT: here.latent}, writes), *copies]
        return self._starts[step]

    def set_condition(self, step: int, name: str, value: np.ndarray) -> None:
        """Take another value of a condition by step, for one of them."""
        self.runner.write(self.by_step[name][step], value)

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

    def _bind(self, index: int, graph: GraphRecord, reads: Mapping[str, int], writes: Mapping[str, int]) -> Launch:
        """Bind a graph at a step; ``reads`` and ``writes`` are the slots of inputs and outputs."""
        inputs: dict[str, Buffer] = {}
        for tensor in graph.inputs:
            name = tensor.name
            if name in reads:
                inputs[name] = self.slots[reads[name]]
            elif name in graph.rows:
                inputs[name] = self._constant(tensor, graph.rows[name].read(self.tables, index, self._shape(tensor)))
            elif name == "timestep":
                inputs[name] = self._constant(tensor, np.full(self._shape(tensor), self.record.steps[index].timestep))
            elif name in self.by_step:
                inputs[name] = self.by_step[name][index]
            elif name in self.conditions:
                inputs[name] = self.conditions[name]
            elif (matrix := self._matrix(tensor)) is not None:
                inputs[name] = matrix
            else:
                inputs[name] = self._value(name, index)
        return self.runner.bind(graph.file, inputs, {name: self.slots[slot] for name, slot in writes.items()})

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
