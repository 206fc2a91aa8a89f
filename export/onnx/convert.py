"""torch to ONNX IR, the one place that calls the exporter; and the simplification of what it makes."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from onnxscript.optimizer import fold_constants
from onnxscript.rewriter import rewrite
from onnxscript.rewriter.rules import common as rules

from dipgo.base.errors import DipgoError
from export.bundle import TensorRecord
from export.onnx.passes import drop_idle_arithmetic, mend
from export.onnx.symbols import sizes_of

OPSET = 23  # from 23 on attention stays one Attention node and GroupNorm one GroupNormalization
_SMALL = 1024  # elements
_RULES = (
    rules.collapse_slice_rule,
    rules.collapse_slice2_rule,
    rules.no_op_cast_rule,
    rules.no_op_expand_rule,
    rules.no_op_transpose_rule,
    rules.reshape_reshape_rule,
    rules.transpose_transpose_rule,
    rules.unsqueeze_unsqueeze_rule,
)


def convert(
    what: str,
    program: Any,
    args: Sequence[Any] | None,
    inputs: Sequence[str],
    outputs: Sequence[str],
    optimize: bool,
    dynamic: tuple[Any, ...] | None = None,
) -> ir.Model:
    """Convert an exported program, or a module with example arguments, to ONNX; :mod:`export.onnx.passes` mend it.

    With ``optimize`` the graph is simplified too, which takes its weights in memory. ``dynamic`` says which sizes of a
    module's arguments stay symbolic, as ``torch.export.export`` takes it.

    Raises:
        DipgoError: ``what`` has no ONNX form; the message holds the exporter's first words on it.
    """
    try:
        with _quiet(), torch.no_grad():
            converted = torch.onnx.export(
                program,
                () if args is None else tuple(args),
                dynamo=True,
                optimize=False,
                opset_version=OPSET,
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_shapes=dynamic,
                verbose=False,
            )
    except Exception as error:
        detail = " ".join(str(error).split())[:300]
        raise DipgoError(f"{what} has no ONNX form: {detail}") from error
    assert converted is not None
    model = converted.model
    mend(model)
    if optimize:
        simplify(model)
    return model


def simplify(model: ir.Model) -> None:
    """Fold constants and remove nodes that do nothing, in place.

    A node that reads a weight outside the graph stays: folding it (a Transpose, mostly) would put a second copy of the
    weight into the graph. No weight is read, so the graph does not depend on what the weights hold. Hence not
    onnxscript's own ``optimize_ir``, which reads biases to see whether they are zero, and takes ``x + 1e-15`` for x.
    """
    initializers = model.graph.initializers
    outside = {name for name, value in initializers.items() if isinstance(value.const_value, ir.ExternalTensor)}

    def should_fold(node: ir.Node) -> bool | None:
        return False if any(value is not None and value.name in outside for value in node.inputs) else None

    passes.InlinePass()(model)
    fold_constants(model, onnx_shape_inference=True, should_fold=should_fold)
    drop_idle_arithmetic(model)
    rewrite(model, _RULES)
    fold_constants(model, onnx_shape_inference=True, should_fold=should_fold)
    passes.RemoveUnusedNodesPass()(model)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    _merge_constants(model.graph)
    passes.CommonSubexpressionEliminationPass()(model)
    passes.OutputFixPass()(model)
    passes.NameFixPass()(model)


def _merge_constants(graph: ir.Graph) -> None:
    """Keep one of each small constant that the graph itself holds."""
    kept: dict[tuple[Any, ...], ir.Value] = {}
    for name, value in list(graph.initializers.items()):
        held = value.const_value
        if held is None or isinstance(held, ir.ExternalTensor) or held.size > _SMALL or value.is_graph_output():
            continue
        first = kept.setdefault((held.dtype, tuple(held.shape.numpy()), held.tobytes()), value)
        if first is not value:
            value.replace_all_uses_with(first)
            del graph.initializers[name]


def tensor_record(value: ir.Value) -> TensorRecord:
    """Describe a graph input or output.

    Raises:
        DipgoError: a size that does not follow from those of the latent.
    """
    assert value.name is not None
    assert value.dtype is not None
    return TensorRecord(name=value.name, dtype=str(value.dtype.numpy()), shape=sizes_of(value))


@contextmanager
def _quiet() -> Iterator[None]:
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)  # it warns of every torchvision operator that is not installed
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        registration.setLevel(level)
