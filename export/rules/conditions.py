"""Rules on conditions: what requests give, by prompt, class or otherwise, is what the graphs take."""

from __future__ import annotations

from math import prod

from dipgo.base.control import PICTURE, STRENGTH
from dipgo.base.guidance import RESCALE, SCALE
from export.records.conditioning import TextRecord
from export.rules.facts import Facts, Problems, Value


def conditions(program: Facts) -> Problems:
    conditioning = program.record.conditioning
    rows = [shape[0] * program.passes for shape in program.latent.shapes]
    for name, value in program.inputs.items():
        if [shape[:1] for shape in value.shapes] != [(count,) for count in rows]:
            yield f"the condition '{name}' has no row for each image and pass of guidance"
    counts = {"nothing": (0,), "class": (1,), "prompt": range(1, 100)}
    chosen = {SCALE, RESCALE} & program.inputs.keys() if conditioning.guidance else set()
    count = len(program.inputs) - len(chosen)
    if len(program.inputs) != len(conditioning.inputs) or count not in counts[conditioning.kind]:
        yield f"conditioned by {conditioning.kind}, with {len(conditioning.inputs)} inputs"
    if conditioning.kind == "class":
        classes = [value for name, value in program.inputs.items() if name not in chosen]
        if any(value.dtype != "int64" or len(value.shapes[0]) != 1 for value in classes):
            yield "the class is no list of whole numbers"
        if conditioning.guided and conditioning.null_class is None:
            yield "guided, without a class that stands for none"


def branches(program: Facts) -> Problems:
    adapters = program.record.adapters
    for branch in adapters.branches if adapters else ():
        for name, place, axis in ((branch.down, branch.down_place, 2), (branch.up, branch.up_place, 1)):
            shape = program.matrices[name].shapes[0] if name in program.matrices else ()
            if len(shape) != 3 or place >= shape[0] or adapters is None or shape[axis] != adapters.rank:
                yield f"the layer '{branch.layer}' has no place in '{name}'"


def prompts(program: Facts) -> Problems:
    encoder = program.record.conditioning.encoder
    for way in encoder.ways if encoder else ():
        yield from _prompts(program, way)


def _prompts(program: Facts, encoder: TextRecord) -> Problems:
    inputs = {tensor.name: program.value(tensor) for tensor in encoder.inputs}
    lengths: dict[str, int] = {}
    for tokenizer in encoder.tokenizers:
        names = [tokenizer.ids, *([] if tokenizer.mask is None else [tokenizer.mask])]
        lengths |= dict.fromkeys(names, tokenizer.length)
    corners = len(program.corners)
    rows = encoder.inputs[0].shape[:1] if encoder.inputs else []
    if not all(isinstance(row, int) for row in rows) or inputs != {
        name: Value("int64", ((*map(int, rows), length),) * corners) for name, length in lengths.items()
    }:
        yield "the tokenizers do not give what the text encoder takes"
    row_shapes = {tensor.name: [shape[1:] for shape in program.value(tensor).shapes] for tensor in encoder.outputs}
    if not rows or not row_shapes:
        yield "the text encoder takes or gives nothing"
    for name, shapes in row_shapes.items():
        if "." in name and shapes != row_shapes.get(name.partition(".")[0]):
            yield f"the text encoder's '{name}' is not of the shape of what it stands for"
    row_shapes |= {name: [(len(row),)] * corners for name, row in encoder.fixed.items()}
    for name, value in program.inputs.items():
        if name in program.record.conditioning.fixed or name == PICTURE:
            continue
        if row_shapes.get(name) != [shape[1:] for shape in value.shapes]:
            yield f"the text encoder does not give the condition '{name}'"
    for name, sizes in encoder.sized.items():
        if len(sizes) != len(encoder.fixed.get(name, ())):
            yield f"'sized' has another length than 'fixed' for '{name}'"


def guidance(program: Facts) -> Problems:
    conditioning = program.record.conditioning
    for name in (*conditioning.guidance.inputs, *{RESCALE} & program.inputs.keys()) if conditioning.guidance else ():
        value = program.inputs.get(name)
        if value is None or not value.is_real or len(conditioning.fixed.get(name, ())) != 1:
            yield f"guidance is by a condition '{name}', which is no number"


def control(program: Facts) -> Problems:
    given = {name: program.inputs.get(name) for name in (PICTURE, STRENGTH)}
    pictures, strengths = given.values()
    if pictures is None and strengths is None:
        return
    if pictures is None or strengths is None or not (pictures.is_real and strengths.is_real):
        yield f"control takes both '{PICTURE}' and '{STRENGTH}', of real numbers"
        return
    cell = program.record.cell
    for picture, strength, latent in zip(pictures.shapes, strengths.shapes, program.latent.shapes, strict=True):
        sides = tuple(side * cell for side in latent[-2:])
        if len(picture) != 4 or picture[2:] != sides or len(strength) != 4 or strength[2:] != (1, 1):
            yield f"control takes no pictures of {sides}, or no strength for each ControlNet"
        elif picture[1] % strength[1]:
            yield f"the pictures of {strength[1]} ControlNets have {picture[1]} channels together"


def fixed(program: Facts) -> Problems:
    for name, row in program.record.conditioning.fixed.items():
        value = program.inputs.get(name)
        if value is None or any(prod(shape[1:]) != len(row) for shape in value.shapes):
            yield f"'fixed' has no row of the condition '{name}'"
