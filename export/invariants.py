"""What holds of every bundle that is read: its records, tables and graphs fit together, so that it runs.

The bounds of single fields stand where the fields are (:mod:`export.bundle`, :mod:`export.graphs`). Here is what ties
them to each other: each rule yields a line on whatever breaks it. Free of torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, product
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from dipgo.base.control import PICTURE, STRENGTH
from dipgo.base.errors import DipgoError
from dipgo.base.guidance import RESCALE, SCALE
from export.axes import shape_at
from export.graphs import GraphRecord, PrologueRecord, Signature, Size, TensorRecord

if TYPE_CHECKING:
    from export.bundle import BundleRecord, SlotRecord, TextRecord

Problems = Iterator[str]
Tables = Mapping[str, np.ndarray]


def problem(record: BundleRecord, tables: Tables, signatures: Mapping[str, Signature]) -> str | None:
    """Return the first rule that a bundle breaks, as a line; None where all parts fit together.

    ``signatures`` are those of the graphs' files, by name, as far as they are known. Rules are tried in order, each on
    what those before it hold.
    """
    program = _Program(record, tables)
    rules = (
        program.latents(),
        _files(record, signatures),
        program.signatures(signatures),
        program.timesteps(),
        program.solver(),
        program.prologues(),
        program.launches(),
        program.starts(),
        program.conditions(),
        program.branches(),
        program.guidance(),
        program.control(),
        program.prompts(),
        program.fixed(),
        program.images(),
        program.pictures(),
    )
    try:
        return next(chain.from_iterable(rules), None)
    except DipgoError as error:  # of a size
        return str(error)


@dataclass(frozen=True)
class _Value:
    """A tensor as what it is bound to must be: its type, and its shapes at all corners of the axes' ranges."""

    dtype: str
    shapes: tuple[tuple[int, ...], ...]

    @property
    def is_real(self) -> bool:
        return "float" in self.dtype

    def at_step(self, steps: int) -> _Value | None:
        """Return one of ``steps`` equal parts of the first dimension; None where there are no such."""
        if any(not shape or shape[0] % steps for shape in self.shapes):
            return None
        return _Value(self.dtype, tuple((shape[0] // steps, *shape[1:]) for shape in self.shapes))


class _Program:
    """The rules on the program; methods are named by what they are about."""

    def __init__(self, record: BundleRecord, tables: Tables) -> None:
        self.record, self.tables = record, tables
        self.calls = len(record.steps)
        ends = [sorted({axis.min, axis.opt, axis.max}) for axis in record.axes.values()]
        self._corners = [dict(zip(record.axes, values, strict=True)) for values in product(*ends)]
        self._values: dict[tuple[str, tuple[Size, ...]], _Value] = {}

    def value(self, tensor: TensorRecord | SlotRecord) -> _Value:
        key = tensor.dtype, tuple(tensor.shape)
        if key not in self._values:
            self._values[key] = _Value(tensor.dtype, tuple(shape_at(tensor.shape, sizes) for sizes in self._corners))
        return self._values[key]

    @cached_property
    def latent(self) -> _Value:
        return self.value(self.record.latent)

    @cached_property
    def inputs(self) -> dict[str, _Value]:
        """The conditions, by name."""
        return {tensor.name: self.value(tensor) for tensor in self.record.conditioning.inputs}

    @cached_property
    def passes(self) -> int:
        """The passes of guidance that a step computes."""
        return 2 if self.record.conditioning.guided else 1

    @cached_property
    def sources(self) -> dict[str, _Value]:
        """What steps read beside slots and tables, by name: conditions, and what prologues compute of them."""
        values: dict[str, _Value] = {}
        for prologue in self.record.prologues:
            values |= self._results(prologue)
        return values | self.inputs | self.matrices

    @cached_property
    def matrices(self) -> dict[str, _Value]:
        """Those of low-rank branches, by name."""
        adapters = self.record.adapters
        return {tensor.name: self.value(tensor) for tensor in adapters.inputs} if adapters else {}

    def latents(self) -> Problems:
        shape, noise = self.record.latent.shape, self.record.noise
        free = not self.record.pixels and len(shape) <= 4  # else packed, or of frames
        names = ("batch", None, "height", "width") if free else ("batch", *[None] * (len(shape) - 1))
        if len(shape) != len(names) or any(isinstance(a, str) and a != b for a, b in zip(shape, names, strict=True)):
            yield f"'latent' is {shape}, not [batch, channels, height, width]"
        elif set(self.record.axes) != {size for size in shape if isinstance(size, str)}:
            yield "'axes' are not the sizes that 'latent' leaves open"
        elif self.latent.dtype != "float32":
            yield f"'latent' is {self.latent.dtype}, not float32"
        elif noise and (not noise.fits or noise.after != shape[1:]):
            yield "'noise' does not make the latent"

    def signatures(self, signatures: Mapping[str, Signature]) -> Problems:
        for file, actual in signatures.items():
            tensors = self.record.tensors[file]
            for records, others in zip(tensors, (actual.inputs, actual.outputs), strict=True):
                values = {tensor.name: self.value(tensor) for tensor in records}
                if len(values) != len(records) or values != {each.name: self.value(each) for each in others}:
                    yield f"'{file}' has other inputs or outputs than the record says"

    def timesteps(self) -> Problems:
        if [step.timestep for step in self.record.steps] != self.record.sampler.timesteps:
            yield "'steps' are not at the timesteps of 'sampler'"
        if not self.record.steps[0].launches:
            yield "step 0 launches nothing"

    def solver(self) -> Problems:
        solver = self.record.solver
        if solver.draws and solver.kind == "graph":
            yield "its sampler draws noise, which graphs are not given"
        columns = 1 + solver.draws + self.calls
        for name, shape in (("rows", (self.calls + 1, columns)), ("input_scale", (self.calls,))):
            table = self.tables.get(f"solver.{name}")
            if table is None or table.shape != shape or not np.isfinite(table).all():
                yield f"the table 'solver.{name}' is not {list(shape)} finite numbers"
        steps = self.record.steps
        slots = {step.epsilon for step in steps} | {step.latent for step in steps if step.launches}
        if solver.kind == "graph":
            slots.add(solver.result)
        for slot in sorted(slots):
            value = self._slot(slot)
            if value is None or not value.is_real or value.shapes != self.latent.shapes:
                yield f"slot {slot} is to hold a latent, and is none"

    def prologues(self) -> Problems:
        known = dict(self.inputs)
        for prologue in self.record.prologues:
            steps = self._steps(prologue)
            for tensor in prologue.inputs:
                if self.matrices.get(tensor.name) == self.value(tensor):
                    continue
                part = self.value(tensor).at_step(steps)
                if part is None or not self._fed(prologue, tensor, part, steps, known):
                    yield f"nothing that fits is given to '{tensor.name}' of '{prologue.file}'"
            if any(self.value(tensor).at_step(steps) is None for tensor in prologue.outputs):
                yield f"'{prologue.file}' does not compute a row for each of {steps} steps"
            known = self._results(prologue) | known

    def _fed(
        self, prologue: PrologueRecord, tensor: TensorRecord, part: _Value, steps: int, known: Mapping[str, _Value]
    ) -> bool:
        """Whether an input of a prologue, ``part`` of it a step, is fed by a table, the timesteps or a value."""
        if tensor.name in prologue.rows:
            table = self.tables.get(prologue.rows[tensor.name].tensor)
            shapes = [(steps, *shape) for shape in part.shapes]
            return table is not None and all(_spreads((*table.shape[:1], 1, *table.shape[1:]), s) for s in shapes)
        if tensor.name == "timestep":
            return all(len(shape) == 1 for shape in part.shapes)
        return known.get(tensor.name) == part

    def launches(self) -> Problems:
        graphs = {
            name: (
                {tensor.name: self.value(tensor) for tensor in graph.inputs},
                {tensor.name: self.value(tensor) for tensor in graph.outputs},
            )
            for name, graph in self.record.graphs.items()
        }
        for number, step in enumerate(self.record.steps):
            for launch in step.launches:
                if launch.graph not in graphs:
                    yield f"step {number} launches '{launch.graph}', which is none of its graphs"
                    continue
                inputs, outputs = graphs[launch.graph]
                for tensors, slots in ((inputs, launch.reads), (outputs, launch.writes)):
                    for name, slot in slots.items():
                        if name not in tensors or self._slot(slot) != tensors[name]:
                            yield f"step {number}: '{name}' of '{launch.graph}' does not fit into slot {slot}"
                graph = self.record.graphs[launch.graph]
                for name, value in inputs.items():
                    if name not in launch.reads and not self._has_source(graph, name, value):
                        yield f"step {number}: nothing that fits is given to '{name}' of '{launch.graph}'"

    def starts(self) -> Problems:
        if self.record.start is None:
            if self.record.encoder:
                yield "it takes pictures, and no step to start from"
            return
        history = self.tables["start.steps"].shape[-1:] if "start.steps" in self.tables else ()
        shapes = {"steps": (self.calls, self.calls, 2, *history), "draws": (self.calls,) * 2, "noised": (self.calls, 2)}
        for name, shape in shapes.items():
            table = self.tables.get(f"start.{name}")
            if table is None or table.shape != shape or not table.size or not np.isfinite(table).all():
                yield f"the table 'start.{name}' is not {list(shape)} finite numbers"
        graph = self.record.start.graph
        inputs = {tensor.name: self.value(tensor) for tensor in graph.inputs}
        outputs = {tensor.name: self.value(tensor) for tensor in graph.outputs}
        for step, awaited in zip(self.record.steps, self.record.awaited, strict=True):
            for slot, name in (awaited | {step.epsilon: "epsilon"}).items():
                if outputs.get(name) != self._slot(slot):
                    yield f"the graph of a first step does not give '{name}' for slot {slot}"
            if "latent" in inputs and inputs["latent"] != self._slot(step.latent):
                yield f"the graph of a first step does not take the latent in slot {step.latent}"
        for name, value in inputs.items():
            if name != "latent" and not self._has_source(graph, name, value):
                yield f"nothing that fits is given to '{name}' of '{graph.file}'"

    def _has_source(self, graph: GraphRecord, name: str, value: _Value) -> bool:
        if name not in graph.rows:
            return name == "timestep" or self.sources.get(name) == value
        row = graph.rows[name]
        table = self.tables.get(row.tensor)
        if table is None or len(table) != self.calls:
            return False
        return all(row.fits(table.shape, shape) for shape in value.shapes)

    def conditions(self) -> Problems:
        conditioning = self.record.conditioning
        rows = [shape[0] * self.passes for shape in self.latent.shapes]
        for name, value in self.inputs.items():
            if [shape[:1] for shape in value.shapes] != [(count,) for count in rows]:
                yield f"the condition '{name}' has no row for each image and pass of guidance"
        counts = {"nothing": (0,), "class": (1,), "prompt": range(1, 100)}
        chosen = {SCALE, RESCALE} & self.inputs.keys() if conditioning.guidance else set()
        count = len(self.inputs) - len(chosen)
        if len(self.inputs) != len(conditioning.inputs) or count not in counts[conditioning.kind]:
            yield f"conditioned by {conditioning.kind}, with {len(conditioning.inputs)} inputs"
        if conditioning.kind == "class":
            classes = [value for name, value in self.inputs.items() if name not in chosen]
            if any(value.dtype != "int64" or len(value.shapes[0]) != 1 for value in classes):
                yield "the class is no list of whole numbers"
            if conditioning.guided and conditioning.null_class is None:
                yield "guided, without a class that stands for none"

    def branches(self) -> Problems:
        adapters = self.record.adapters
        for branch in adapters.branches if adapters else ():
            for name, place, axis in ((branch.down, branch.down_place, 2), (branch.up, branch.up_place, 1)):
                shape = self.matrices[name].shapes[0] if name in self.matrices else ()
                if len(shape) != 3 or place >= shape[0] or adapters is None or shape[axis] != adapters.rank:
                    yield f"the layer '{branch.layer}' has no place in '{name}'"

    def prompts(self) -> Problems:
        encoder = self.record.conditioning.encoder
        for way in encoder.ways if encoder else ():
            yield from self._prompts(way)

    def _prompts(self, encoder: TextRecord) -> Problems:
        inputs = {tensor.name: self.value(tensor) for tensor in encoder.inputs}
        lengths: dict[str, int] = {}
        for tokenizer in encoder.tokenizers:
            names = [tokenizer.ids, *([] if tokenizer.mask is None else [tokenizer.mask])]
            lengths |= dict.fromkeys(names, tokenizer.length)
        corners = len(self._corners)
        rows = encoder.inputs[0].shape[:1] if encoder.inputs else []
        if not all(isinstance(row, int) for row in rows) or inputs != {
            name: _Value("int64", ((*map(int, rows), length),) * corners) for name, length in lengths.items()
        }:
            yield "the tokenizers do not give what the text encoder takes"
        row_shapes = {tensor.name: [shape[1:] for shape in self.value(tensor).shapes] for tensor in encoder.outputs}
        if not rows or not row_shapes:
            yield "the text encoder takes or gives nothing"
        for name, shapes in row_shapes.items():
            if "." in name and shapes != row_shapes.get(name.partition(".")[0]):
                yield f"the text encoder's '{name}' is not of the shape of what it stands for"
        row_shapes |= {name: [(len(row),)] * corners for name, row in encoder.fixed.items()}
        for name, value in self.inputs.items():
            if name in self.record.conditioning.fixed or name == PICTURE:
                continue
            if row_shapes.get(name) != [shape[1:] for shape in value.shapes]:
                yield f"the text encoder does not give the condition '{name}'"
        for name, sizes in encoder.sized.items():
            if len(sizes) != len(encoder.fixed.get(name, ())):
                yield f"'sized' has another length than 'fixed' for '{name}'"

    def guidance(self) -> Problems:
        conditioning = self.record.conditioning
        for name in (*conditioning.guidance.inputs, *{RESCALE} & self.inputs.keys()) if conditioning.guidance else ():
            value = self.inputs.get(name)
            if value is None or not value.is_real or len(conditioning.fixed.get(name, ())) != 1:
                yield f"guidance is by a condition '{name}', which is no number"

    def control(self) -> Problems:
        given = {name: self.inputs.get(name) for name in (PICTURE, STRENGTH)}
        pictures, strengths = given.values()
        if pictures is None and strengths is None:
            return
        if pictures is None or strengths is None or not (pictures.is_real and strengths.is_real):
            yield f"control takes both '{PICTURE}' and '{STRENGTH}', of real numbers"
            return
        cell = self.record.cell
        for picture, strength, latent in zip(pictures.shapes, strengths.shapes, self.latent.shapes, strict=True):
            sides = tuple(side * cell for side in latent[-2:])
            if len(picture) != 4 or picture[2:] != sides or len(strength) != 4 or strength[2:] != (1, 1):
                yield f"control takes no pictures of {sides}, or no strength for each ControlNet"
            elif picture[1] % strength[1]:
                yield f"the pictures of {strength[1]} ControlNets have {picture[1]} channels together"

    def fixed(self) -> Problems:
        for name, row in self.record.conditioning.fixed.items():
            value = self.inputs.get(name)
            if value is None or any(prod(shape[1:]) != len(row) for shape in value.shapes):
                yield f"'fixed' has no row of the condition '{name}'"

    def pictures(self) -> Problems:
        encoder, cell, sides = self.record.encoder, self.record.cell, self.record.pixels
        if encoder is None:
            return
        mean, deviation, pixels = map(self.value, (encoder.mean, encoder.deviation, encoder.input))
        if mean != deviation or mean != self.latent:
            yield "the VAE encoder does not make the latent"
        cells = [(b, *((side // cell for side in sides) if sides else rest[-2:])) for b, *rest in self.latent.shapes]
        if pixels.dtype != "float32" or any(
            len(shape) != 6 or shape[0] != b or shape[1:] != (3, rows, cell, columns, cell)
            for shape, (b, rows, columns) in zip(pixels.shapes, cells, strict=True)
        ):
            yield f"the VAE encoder takes no pictures with {cell} pixels for each cell of the latent"

    def images(self) -> Problems:
        decoder, cell = self.record.decoder, self.record.cell
        channels, sides = self.latent.shapes[0][1], self.record.pixels
        if decoder is None:
            if self.record.conditioning.kind == "nothing" and channels not in (1, 3):
                yield f"its latents are images, and have {channels} channels"
            return
        pixels, side = self.value(decoder.output), self.value(decoder.input)
        if side != self.latent:
            yield "the decoder does not take the latent"
        images = [(b, *(sides or (side * cell for side in rest[-2:]))) for b, *rest in self.latent.shapes]
        if not pixels.is_real or any(
            len(shape) != 4 or shape[1] not in (1, 3) or (shape[0], *shape[2:]) != image
            for shape, image in zip(pixels.shapes, images, strict=True)
        ):
            yield f"the decoder makes no images with {cell} pixels for each cell of the latent"

    def _slot(self, number: int) -> _Value | None:
        return self.value(self.record.slots[number]) if number < len(self.record.slots) else None

    def _steps(self, prologue: PrologueRecord) -> int:
        return self.calls if prologue.kind == "steps" else 1

    def _results(self, prologue: PrologueRecord) -> dict[str, _Value]:
        """Return what a prologue computes for one step, by name."""
        values = {tensor.name: self.value(tensor).at_step(self._steps(prologue)) for tensor in prologue.outputs}
        return {name: value for name, value in values.items() if value is not None}


def _files(record: BundleRecord, signatures: Mapping[str, Signature]) -> Problems:
    graphs = len(record.graphs) + len(record.prologues)
    graphs += len(record.conditioning.encoder.ways) if record.conditioning.encoder else 0
    graphs += sum(part is not None for part in (record.decoder, record.start, record.encoder))
    if len(record.tensors) != graphs:
        yield "two graphs have one file"
    for file, signature in signatures.items():
        for name in sorted(signature.weights - record.files.keys()):
            yield f"'{file}' has weights in '{name}', which is not among its files"


def _spreads(shape: Sequence[int], target: tuple[int, ...]) -> bool:
    """Whether numpy broadcasts a shape to another."""
    try:
        return np.broadcast_shapes(tuple(shape), target) == target
    except ValueError:
        return False
