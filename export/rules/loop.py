"""Rules on the loop: latents, solver, prologues, launches and first steps fit each other, the slots and the tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from export.records.graphs import PrologueRecord, TensorRecord
from export.rules.facts import Facts, Problems, Value


def latents(program: Facts) -> Problems:
    shape, noise = program.record.latent.shape, program.record.noise
    free = not program.record.pixels and len(shape) <= 4  # else packed, or of frames
    names = ("batch", None, "height", "width") if free else ("batch", *[None] * (len(shape) - 1))
    if len(shape) != len(names) or any(isinstance(a, str) and a != b for a, b in zip(shape, names, strict=True)):
        yield f"'latent' is {shape}, not [batch, channels, height, width]"
    elif set(program.record.axes) != {size for size in shape if isinstance(size, str)}:
        yield "'axes' are not the sizes that 'latent' leaves open"
    elif program.latent.dtype != "float32":
        yield f"'latent' is {program.latent.dtype}, not float32"
    elif noise and (not noise.fits or noise.after != shape[1:]):
        yield "'noise' does not make the latent"


def timesteps(program: Facts) -> Problems:
    if [step.timestep for step in program.record.steps] != program.record.sampler.timesteps:
        yield "'steps' are not at the timesteps of 'sampler'"
    if not program.record.steps[0].launches:
        yield "step 0 launches nothing"


def solver(program: Facts) -> Problems:
    solver = program.record.solver
    if solver.draws and solver.kind == "graph":
        yield "its sampler draws noise, which graphs are not given"
    columns = 1 + solver.draws + program.calls
    for name, shape in (("rows", (program.calls + 1, columns)), ("input_scale", (program.calls,))):
        table = program.tables.get(f"solver.{name}")
        if table is None or table.shape != shape or not np.isfinite(table).all():
            yield f"the table 'solver.{name}' is not {list(shape)} finite numbers"
    steps = program.record.steps
    slots = {step.epsilon for step in steps} | {step.latent for step in steps if step.launches}
    if solver.kind == "graph":
        slots.add(solver.result)
    for slot in sorted(slots):
        value = program.slot(slot)
        if value is None or not value.is_real or value.shapes != program.latent.shapes:
            yield f"slot {slot} is to hold a latent, and is none"


def prologues(program: Facts) -> Problems:
    known = dict(program.inputs)
    for prologue in program.record.prologues:
        steps = program.steps_of(prologue)
        for tensor in prologue.inputs:
            if program.matrices.get(tensor.name) == program.value(tensor):
                continue
            part = program.value(tensor).at_step(steps)
            if part is None or not _fed(program, prologue, tensor, part, steps, known):
                yield f"nothing that fits is given to '{tensor.name}' of '{prologue.file}'"
        if any(program.value(tensor).at_step(steps) is None for tensor in prologue.outputs):
            yield f"'{prologue.file}' does not compute a row for each of {steps} steps"
        known = program.results(prologue) | known


def _fed(
    program: Facts, prologue: PrologueRecord, tensor: TensorRecord, part: Value, steps: int, known: Mapping[str, Value]
) -> bool:
    """Whether an input of a prologue, ``part`` of it a step, is fed by a table, the timesteps or a value."""
    if tensor.name in prologue.rows:
        table = program.tables.get(prologue.rows[tensor.name].tensor)
        shapes = [(steps, *shape) for shape in part.shapes]
        return table is not None and all(_spreads((*table.shape[:1], 1, *table.shape[1:]), s) for s in shapes)
    if tensor.name == "timestep":
        return all(len(shape) == 1 for shape in part.shapes)
    return known.get(tensor.name) == part


def launches(program: Facts) -> Problems:
    graphs = {
        name: (
            {tensor.name: program.value(tensor) for tensor in graph.inputs},
            {tensor.name: program.value(tensor) for tensor in graph.outputs},
        )
        for name, graph in program.record.graphs.items()
    }
    for number, step in enumerate(program.record.steps):
        for launch in step.launches:
            if launch.graph not in graphs:
                yield f"step {number} launches '{launch.graph}', which is none of its graphs"
                continue
            inputs, outputs = graphs[launch.graph]
            for tensors, slots in ((inputs, launch.reads), (outputs, launch.writes)):
                for name, slot in slots.items():
                    if name not in tensors or program.slot(slot) != tensors[name]:
                        yield f"step {number}: '{name}' of '{launch.graph}' does not fit into slot {slot}"
            graph = program.record.graphs[launch.graph]
            for name, value in inputs.items():
                if name not in launch.reads and not program.has_source(graph, name, value):
                    yield f"step {number}: nothing that fits is given to '{name}' of '{launch.graph}'"


def starts(program: Facts) -> Problems:
    if program.record.start is None:
        if program.record.encoder:
            yield "it takes pictures, and no step to start from"
        return
    history = program.tables["start.steps"].shape[-1:] if "start.steps" in program.tables else ()
    shapes = {
        "steps": (program.calls, program.calls, 2, *history),
        "draws": (program.calls,) * 2,
        "noised": (program.calls, 2),
    }
    for name, shape in shapes.items():
        table = program.tables.get(f"start.{name}")
        if table is None or table.shape != shape or not table.size or not np.isfinite(table).all():
            yield f"the table 'start.{name}' is not {list(shape)} finite numbers"
    graph = program.record.start.graph
    inputs = {tensor.name: program.value(tensor) for tensor in graph.inputs}
    outputs = {tensor.name: program.value(tensor) for tensor in graph.outputs}
    for step, awaited in zip(program.record.steps, program.record.awaited, strict=True):
        for slot, name in (awaited | {step.epsilon: "epsilon"}).items():
            if outputs.get(name) != program.slot(slot):
                yield f"the graph of a first step does not give '{name}' for slot {slot}"
        if "latent" in inputs and inputs["latent"] != program.slot(step.latent):
            yield f"the graph of a first step does not take the latent in slot {step.latent}"
    for name, value in inputs.items():
        if name != "latent" and not program.has_source(graph, name, value):
            yield f"nothing that fits is given to '{name}' of '{graph.file}'"


def _spreads(shape: Sequence[int], target: tuple[int, ...]) -> bool:
    """Whether numpy broadcasts a shape to another."""
    try:
        return np.broadcast_shapes(tuple(shape), target) == target
    except ValueError:
        return False
