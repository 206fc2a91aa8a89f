"""Converted denoisers: operators stay whole, nothing depends on what weights hold, and what converters get wrong.

That graphs compute what torch computes, in every family and precision, is proven by the programs made of them:
``test_parity.py`` and ``test_precision.py``.
"""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch

from export.onnx.convert import convert, export_module, simplify
from export.onnx.passes import MEND
from tests import zoo


def denoiser(kind, guidance=4.0):
    return zoo.converted(zoo.trace(kind, guidance=guidance), whole=False).denoiser.model.clone()


def test_whole_operators_stay_and_no_weight_is_copied():
    graph = denoiser("sd").graph
    operators = [node.op_type for node in graph]
    module = zoo.model("sd").empty_denoiser()
    assert operators.count("Attention") == sum(name.endswith(("attn1", "attn2")) for name, _ in module.named_modules())
    norms = sum(isinstance(part, torch.nn.GroupNorm) for part in module.modules())
    assert operators.count("GroupNormalization") == norms
    assert "SequenceAt" not in operators
    held = [value.const_value for value in graph.initializers.values()]
    assert sum(tensor.nbytes for tensor in held if not isinstance(tensor, ir.ExternalTensor)) < 4096


def test_a_graph_does_not_depend_on_what_the_weights_hold(tmp_path):
    """Simplified without the checkpoint: whoever reads a weight here fails."""
    model = denoiser("unconditional", 1.0)
    for value in model.graph.initializers.values():
        held = value.const_value
        if isinstance(held, ir.ExternalTensor):
            where = {"shape": held.shape, "name": held.name, "base_dir": tmp_path}
            value.const_value = ir.ExternalTensor("absent", held.offset, held.length, held.dtype, **where)
    simplify(model)


class _Tiny(torch.nn.Module):
    """What converters and simplifiers get wrong: a tiny addend, a squeeze of nothing, a factor of one."""

    def forward(self, x):
        return (x / (x + 1e-15)).squeeze(1), x * 1.0, x.squeeze(1)


def test_tiny_addends_and_idle_squeezes():
    program = export_module("tiny", _Tiny().eval(), [torch.ones(2, 3)])
    model = convert("tiny", program, ["x"], ["a", "b", "c"], (2, 3))
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.zeros((2, 3), np.float32)
    for result in session.run(["a", "b", "c"], {"x": x}):  # the first is 0 / 1e-15; without the addend it is no number
        assert np.array_equal(result, x)
    assert {node.op_type for node in model.graph} <= {"Add", "Div", "Identity"}


class _Masks(torch.nn.Module):
    """HunyuanVideo's way with masks: one boolean tensor where another says so."""

    def forward(self, x):
        return torch.where(x > 0, x > 2, x > -2).float()


def test_a_choice_between_booleans_is_logic():
    program = export_module("masks", _Masks().eval(), [torch.ones(2, 3)])
    model = convert("masks", program, ["x"], ["y"], (2, 3))
    assert "Where" not in {node.op_type for node in model.graph}
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.array([[-3, -1, 0], [1, 2, 3]], np.float32)
    assert np.array_equal(session.run(["y"], {"x": x})[0], np.array([[0, 1, 1], [0, 0, 1]]))


def test_mending_twice_changes_nothing():
    model = denoiser("pixart")
    before = [node.op_type for node in model.graph]
    MEND(model)
    assert [node.op_type for node in model.graph] == before
    assert "Expand" in before
