"""Rules on the parts: files and graphs are what the record says, pictures and images are those of the latent."""

from __future__ import annotations

from collections.abc import Mapping

from export.records.graphs import Signature
from export.rules.facts import Facts, Problems


def signatures(program: Facts, signatures: Mapping[str, Signature]) -> Problems:
    for file, actual in signatures.items():
        tensors = program.record.tensors[file]
        for records, others in zip(tensors, (actual.inputs, actual.outputs), strict=True):
            values = {tensor.name: program.value(tensor) for tensor in records}
            if len(values) != len(records) or values != {each.name: program.value(each) for each in others}:
                yield f"'{file}' has other inputs or outputs than the record says"


def images(program: Facts) -> Problems:
    decoder, cell = program.record.decoder, program.record.cell
    channels, sides = program.latent.shapes[0][1], program.record.pixels
    if decoder is None:
        if program.record.conditioning.kind == "nothing" and channels not in (1, 3):
            yield f"its latents are images, and have {channels} channels"
        return
    pixels, side = program.value(decoder.output), program.value(decoder.input)
    if side != program.latent:
        yield "the decoder does not take the latent"
    images = [(b, *(sides or (side * cell for side in rest[-2:]))) for b, *rest in program.latent.shapes]
    if not pixels.is_real or any(
        len(shape) != 4 or shape[1] not in (1, 3) or (shape[0], *shape[2:]) != image
        for shape, image in zip(pixels.shapes, images, strict=True)
    ):
        yield f"the decoder makes no images with {cell} pixels for each cell of the latent"


def pictures(program: Facts) -> Problems:
    encoder, cell, sides = program.record.encoder, program.record.cell, program.record.pixels
    if encoder is None:
        return
    mean, deviation, pixels = map(program.value, (encoder.mean, encoder.deviation, encoder.input))
    if mean != deviation or mean != program.latent:
        yield "the VAE encoder does not make the latent"
    cells = [(b, *((side // cell for side in sides) if sides else rest[-2:])) for b, *rest in program.latent.shapes]
    if pixels.dtype != "float32" or any(
        len(shape) != 6 or shape[0] != b or shape[1:] != (3, rows, cell, columns, cell)
        for shape, (b, rows, columns) in zip(pixels.shapes, cells, strict=True)
    ):
        yield f"the VAE encoder takes no pictures with {cell} pixels for each cell of the latent"


def files(program: Facts, signatures: Mapping[str, Signature]) -> Problems:
    record = program.record
    graphs = len(record.graphs) + len(record.prologues)
    graphs += len(record.conditioning.encoder.ways) if record.conditioning.encoder else 0
    graphs += sum(part is not None for part in (record.decoder, record.start, record.encoder))
    if len(record.tensors) != graphs:
        yield "two graphs have one file"
    for file, signature in signatures.items():
        for name in sorted(signature.weights - record.files.keys()):
            yield f"'{file}' has weights in '{name}', which is not among its files"
