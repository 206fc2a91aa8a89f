"""Binding times: what does not depend on the latent is computed before the loop.

A value that the step graphs read and that depends on the timestep (and perhaps on the prompt or class), such as
adaLN's modulation, is computed for all steps at once by the ``steps`` prologue, a batch of steps x images. A value
that depends on the prompt alone, such as cross-attention's keys and values, is computed once by the ``prompt``
prologue. Both are cut out of the same conversion as the step graphs.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from export.bundle import PrologueRecord
from export.convert import tensor_record
from export.tapped import Tapped, specialise

STEPS, PROMPT = "steps", "prompt"


@dataclass(frozen=True)
class Prologue:
    """A prologue's graph and its description."""

    model: ir.Model
    record: PrologueRecord


def hoisted_values(tapped: Tapped) -> dict[str, str]:
    """Return the values that step graphs take as inputs instead of computing them: STEPS or PROMPT by name."""
    graph = tapped.model.graph
    known = {value.name for node in tapped.symbolic.graph for value in node.outputs}
    reads: dict[ir.Value, set[str]] = {}
    for value in graph.inputs:
        reads[value] = {value.name or ""}
    for node in graph:
        sources = set[str]().union(*(reads.get(value, set()) for value in node.inputs if value is not None))
        reads.update(dict.fromkeys(node.outputs, sources))

    frontier: dict[str, str] = {}
    for node in graph:
        if "latent" not in reads[node.outputs[0]]:
            continue
        for read in node.inputs:
            sources = reads.get(read, set()) if read is not None else set()
            if read is None or read.name is None or not sources or "latent" in sources or read.producer() is None:
                continue
            by_row = read.shape is not None and len(read.shape) > 0 and read.shape[0] in _row_counts(tapped)
            if read.name in known and by_row:
                frontier[read.name] = STEPS if "timestep" in sources else PROMPT
    return frontier


def cut_prologue(tapped: Tapped, kind: str, names: list[str], calls: int) -> Prologue | None:
    """Cut the prologue that computes ``names``, or None where there is nothing to compute."""
    if not names:
        return None
    # Shapes are read off latent and timestep too, until the number of images is fixed; then those inputs go unused.
    by_row = _timestep_by_row(tapped.symbolic)
    given = dict.fromkeys([by_row, "timestep", "latent", *tapped.condition_names])
    graph = ir.convenience.extract(tapped.symbolic.graph, list(given), names)
    model = ir.Model(graph, ir_version=tapped.model.ir_version, producer_name="dipgo")
    batch = tapped.batch * (calls if kind == STEPS else 1)
    specialise(model, batch)
    RemoveUnusedNodesPass()(model)
    for unused in [value for value in graph.inputs if not value.uses()]:
        graph.inputs.remove(unused)
    for value in graph.inputs:
        if value.name == by_row:
            value.name = "timestep"
    record = PrologueRecord(
        file="",
        kind=kind,
        inputs=[tensor_record(value) for value in graph.inputs],
        outputs=[tensor_record(value) for value in graph.outputs],
    )
    return Prologue(model, record)


def _timestep_by_row(model: ir.Model) -> str:
    """Return the name of the timestep as the denoiser takes it, one a row: with guidance, of both halves."""
    for node in model.graph:
        if node.op_type == "Concat" and all(value is not None and value.name == "timestep" for value in node.inputs):
            return str(node.outputs[0].name)
    return "timestep"


def _row_counts(tapped: Tapped) -> set[int]:
    return {tapped.batch, tapped.batch * tapped.trace.rows}
