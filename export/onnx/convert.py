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
from torch import nn
from torch.export import ExportedProgram

from dipgo.base.errors import DipgoError
from export.onnx.cache import cached, digest_of_program
from export.onnx.passes import MEND, DropIdleArithmetic, MergeConstants
from export.onnx.symbols import name_axes, sizes_of
from export.records.graphs import Size, TensorRecord

OPSET = 23  # from 23 on attention stays one Attention node and GroupNorm one GroupNormalization
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
_TIDY = ir.passes.Sequential(
    passes.RemoveUnusedNodesPass(),
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
    MergeConstants(),
    passes.CommonSubexpressionEliminationPass(),
    passes.OutputFixPass(),
    passes.NameFixPass(),
)


def convert(
    what: str,
    program: ExportedProgram,
    inputs: Sequence[str],
    outputs: Sequence[str],
    sizes: Sequence[Size] | None = None,
) -> ir.Model:
    """Convert an exported program to ONNX; :mod:`export.onnx.passes` mend the graph.

    With ``sizes`` of its first input it is simplified at these, see :func:`specialise`. Its parameters are initializers
    without values, for :func:`export.onnx.weights.bind`. What was converted before comes from the disk
    (:mod:`export.onnx.cache`).

    Raises:
        DipgoError: ``what`` has no ONNX form; the message holds the exporter's first words on it.
    """

    def make() -> ir.Model:
        model = _converted(what, program, list(inputs), list(outputs))
        if sizes is not None:
            specialise(model, inputs[0], sizes)
        return model

    return cached(["convert", digest_of_program(program), inputs, outputs, sizes], make)


def export_module(
    what: str, module: nn.Module, args: Sequence[torch.Tensor], dynamic: tuple[Any, ...] | None = None
) -> ExportedProgram:
    """Trace a module on example arguments; ``dynamic`` says which of their sizes stay symbolic, as in torch.export.

    Raises:
        DipgoError: ``what`` cannot be traced.
    """
    with _exporter(what):
        return torch.export.export(module, tuple(args), dynamic_shapes=dynamic, strict=False)


def _converted(what: str, program: ExportedProgram, inputs: list[str], outputs: list[str]) -> ir.Model:
    with _exporter(what):
        onnx_program = torch.onnx.export(
            program,
            (),
            dynamo=True,
            optimize=False,
            opset_version=OPSET,
            input_names=inputs,
            output_names=outputs,
            verbose=False,
        )
    assert onnx_program is not None
    model = onnx_program.model
    passes.ClearMetadataAndDocStringPass()(model)
    for name in program.graph_signature.parameters:
        value = model.graph.initializers.get(name)
        if value is not None and value.const_value is not None:
            tensor = value.const_value
            value.const_value = ir.ExternalTensor(
                "unbound", 0, tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name, base_dir=""
            )
    MEND(model)
    return model


def specialise(model: ir.Model, name: str, sizes: Sequence[Size]) -> None:
    """Fix or name the sizes of the input ``name``, and all that follow from them, and simplify, in place.

    Raises:
        DipgoError: a size that does not follow from these.
    """
    name_axes(model, name, sizes)
    simplify(model)


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
    with _errors_alone("onnxscript.optimizer._constant_folding"):  # it warns of each weight that it cannot read
        fold_constants(model, onnx_shape_inference=True, should_fold=should_fold)
        DropIdleArithmetic()(model)
        rewrite(model, _RULES)
        fold_constants(model, onnx_shape_inference=True, should_fold=should_fold)
    _TIDY(model)


def tensor_record(value: ir.Value) -> TensorRecord:
    """Describe a graph input or output.

    Raises:
        DipgoError: a size that does not follow from those of the latent.
    """
    assert value.name is not None
    assert value.dtype is not None
    return TensorRecord(name=value.name, dtype=str(value.dtype.numpy()), shape=sizes_of(value))


@contextmanager
def _exporter(what: str) -> Iterator[None]:
    """Silence torch, and turn whatever it raises into one line."""
    registration = (
        "torch.onnx._internal.exporter._registration"  # warns of torchvision operators that are not installed
    )
    try:
        with warnings.catch_warnings(), torch.no_grad(), _errors_alone(registration):
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        detail = " ".join(str(error).split())[:300]
        raise DipgoError(f"{what} has no ONNX form: {detail}") from error


@contextmanager
def _errors_alone(logger: str) -> Iterator[None]:
    """Keep a library's warnings from users, who can do nothing about them."""
    log = logging.getLogger(logger)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
