"""The traced denoiser as ONNX: one graph with every site's outputs named, its weights pointing into one file.

Converted once per model; :mod:`export.cut` makes each signature's graph out of it.
"""

from __future__ import annotations

import json
import re
import struct
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from onnxscript import optimizer

from dipgo.errors import DipgoError
from dipgo.trace import Trace
from export.convert import convert

_DTYPES = {"F32": ir.DataType.FLOAT, "F16": ir.DataType.FLOAT16, "BF16": ir.DataType.BFLOAT16}
_PREFIX = "guided.denoiser."


@dataclass(frozen=True)
class Tapped:
    """The whole denoiser in ONNX.

    Attributes:
        trace: what it was made from.
        batch: images per call of ``model``.
        symbolic: the graph as converted, for any number of images.
        model: the graph at ``batch`` images, optimised; outputs are ``epsilon`` and, for each site,
            :func:`feature_name`.
        condition_names: the graph inputs that carry the conditions.
        weights_file: the safetensors file that the initializers point into.
    """

    trace: Trace
    batch: int
    symbolic: ir.Model
    model: ir.Model
    condition_names: tuple[str, ...]
    weights_file: Path


def feature_name(site: str, output: int) -> str:
    """Return the name of a site's output in the graph: ``feature.<site>``, then ``#1``, ``#2`` for further ones."""
    return f"feature.{site}" + (f"#{output}" if output else "")


def to_onnx(trace: Trace, batch: int = 1) -> Tapped:
    """Convert a trace to ONNX (opset 23), weights left where they are.

    Raises:
        DipgoError: a node that has no ONNX form, or a checkpoint that does not hold the traced parameters.
    """
    conditions = tuple(trace.model.family.example(trace.model.config, 1))
    features = [
        feature_name(site.name, output)
        for site, values in zip(trace.sites, trace.outputs, strict=True)
        for output in range(len(values))
    ]
    model = convert(
        trace.model.family.denoiser_class,
        trace.program,
        None,
        ["latent", "timestep", *conditions],
        ["epsilon", *features],
        optimize=False,
    )
    weights_file = _only_weights_file(trace)
    _bind(model, weights_file, set(trace.program.graph_signature.parameters))

    ClearMetadataAndDocStringPass()(model)
    static = model.clone()
    specialise(static, batch)
    return Tapped(trace, batch, model, static, conditions, weights_file)


def specialise(model: ir.Model, batch: int) -> None:
    """Fix the number of images, which is the only symbolic size, and optimise.

    Weights stay where they are: folding a node that reads one (a Transpose, mostly) would put a second copy of it into
    the graph.
    """
    graph = model.graph
    weights = {name for name, value in graph.initializers.items() if isinstance(value.const_value, ir.ExternalTensor)}

    def should_fold(node: ir.Node) -> bool | None:
        return False if any(value is not None and value.name in weights for value in node.inputs) else None

    values = [*graph.inputs, *(output for node in graph for output in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape([_size(dimension, batch) for dimension in value.shape])
    optimizer.optimize_ir(model, should_fold=should_fold)


def _size(dimension: int | ir.SymbolicDim, batch: int) -> int | ir.SymbolicDim:
    """Evaluate a size: a whole number, the number of images, or a multiple of it such as ``2*s0``."""
    if isinstance(dimension, int) or dimension.value is None:
        return dimension
    factor = re.fullmatch(r"(?:(\d+)\*)?s\d+", str(dimension.value))
    if factor is None:
        return ir.SymbolicDim(None)
    return int(factor[1] or 1) * batch


def _only_weights_file(trace: Trace) -> Path:
    files = trace.model.weights_files
    if len(files) != 1:
        raise DipgoError(
            f"{files[0].parent}: weights in {len(files)} files; save the pipeline with a larger max_shard_size"
        )
    return files[0]


def _bind(model: ir.Model, weights_file: Path, parameters: set[str]) -> None:
    """Point the initializers into the checkpoint."""
    with weights_file.open("rb") as stream:
        length = struct.unpack("<Q", stream.read(8))[0]
        header = json.loads(stream.read(length))
    bound = set()
    for name, value in model.graph.initializers.items():
        entry = header.get(name.removeprefix(_PREFIX))
        traced = value.const_value
        if entry is None or traced is None:
            continue
        start, end = entry["data_offsets"]
        if list(traced.shape) != entry["shape"] or traced.dtype != _DTYPES.get(entry["dtype"]):
            raise DipgoError(
                f"{weights_file}: '{name.removeprefix(_PREFIX)}' is {entry['dtype']} {entry['shape']}, the model's "
                f"configuration wants {traced.dtype.name} {list(traced.shape)}; use the matching checkpoint, in float32"
            )
        value.const_value = ir.ExternalTensor(
            weights_file.name,
            8 + length + start,
            end - start,
            traced.dtype,
            shape=ir.Shape(entry["shape"]),
            name=name,
            base_dir=weights_file.parent,
        )
        bound.add(name)
    missing = sorted(parameters.intersection(model.graph.initializers) - bound)
    if missing:
        name = missing[0].removeprefix(_PREFIX)
        raise DipgoError(f"{weights_file}: holds no tensor '{name}'; it belongs to another model")
