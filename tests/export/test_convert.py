"""Every family as ONNX, in every precision: valid, and equal to torch on the ONNX Runtime."""

import shutil
from functools import cache

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dipgo.graph.exported import in_dtype
from dipgo.model.families import GuidedDenoiser
from dipgo.model.models import find_model
from export.onnx.convert import convert, export_module, simplify
from export.onnx.passes import MEND
from tests import zoo

PREFIX = "guided.denoiser."
slow = pytest.mark.slow  # parity of whole programs, in tests/export/test_parity.py, proves as much of most graphs


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Return ``kind, guidance, dtype -> trace, graph, weights file``, each graph converted once."""

    @cache
    def get(kind, guidance, dtype=torch.float32):
        folder = tmp_path_factory.mktemp(kind) / "model"
        return convert_in(find_model(str(shutil.copytree(zoo.pipeline(kind), folder))), kind, guidance, dtype)

    def copied(*key):
        traced, symbolic, file = get(*key)
        return traced, symbolic.clone(), file

    return copied


def convert_in(model, kind, guidance, dtype):
    """Return the trace, the graph for any number of images, and the weights file that the graph is bound to."""
    traced = zoo.trace(kind, guidance=guidance, dtype=dtype)
    conditions = list(model.family.example(model.config, 1))
    features = [f"feature.{index}" for index in range(sum(map(len, traced.outputs)))]
    symbolic = convert("denoiser", traced.program, ["latent", "timestep", *conditions], ["epsilon", *features])
    file = model.weights_files[0]
    if dtype != torch.float32:
        weights = {name: value.to(dtype) for name, value in load_file(file).items()}
        file = file.with_name(f"{str(dtype).removeprefix('torch.')}.safetensors")
        save_file(weights, file)
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    with safe_open(file, "numpy") as stored:
        names = set(stored.keys())
    offsets = read_offsets(file)
    for name, value in symbolic.graph.initializers.items():
        key = name.removeprefix(PREFIX)
        if key in names:
            held, (start, end) = value.const_value, offsets[key]
            value.const_value = ir.ExternalTensor(
                file.name, header + start, end - start, held.dtype, shape=held.shape, name=name, base_dir=file.parent
            )
    return traced, symbolic, file


def read_offsets(file):
    import json

    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        entries = json.loads(stream.read(length))
    return {name: entry["data_offsets"] for name, entry in entries.items() if name != "__metadata__"}


def static(symbolic, batch, file):
    """Save the graph at a number of images, simplified, beside its weights; return its path."""
    model = symbolic.clone()
    graph = model.graph
    for value in [*graph.inputs, *(output for node in graph for output in node.outputs)]:
        if value.shape is not None:
            value.shape = ir.Shape([fixed(size, batch) for size in value.shape])
    simplify(model)
    path = file.with_name("graph.onnx")
    ir.save(model, path)
    return path


def fixed(size, batch):
    if isinstance(size, int) or size.value is None:
        return size
    first = str(size.value).split("*")[0]
    return batch * (int(first) if first.isdigit() else 1)


def drawn(traced, batch):
    """Return a latent, a timestep and conditions of ``batch`` images in float32; masks hide padding."""
    generator = torch.Generator().manual_seed(batch)
    conditions = {}
    for name, value in traced.model.family.example(traced.model.config, batch * traced.rows).items():
        conditions[name] = value
        if name == "class_labels":
            conditions[name] = torch.randint(0, 1000, value.shape, generator=generator)
        elif "mask" in name:
            for row in range(len(value)):
                value[row, 5 + 3 * row :] = 0
        elif not value.any():
            conditions[name] = torch.randn(value.shape, generator=generator)
    return torch.randn(traced.model.latent_shape(batch), generator=generator), torch.full((batch,), 701.0), conditions


def torch_epsilon(traced, denoiser, dtype, latent, timestep, conditions):
    guided = GuidedDenoiser(denoiser.to(dtype), in_dtype(traced.model.family, dtype), traced.guidance_scale)
    given = {name: value.to(dtype) if value.is_floating_point() else value for name, value in conditions.items()}
    with torch.no_grad():
        return guided(latent, timestep, given).numpy()


def onnx_epsilon(path, dtype, latent, timestep, conditions):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    given = {name: value.to(dtype) if value.is_floating_point() else value for name, value in conditions.items()}
    given |= {"latent": latent, "timestep": timestep}
    return session.run(["epsilon"], {entry.name: given[entry.name].numpy() for entry in session.get_inputs()})[0]


def denoiser_of(model):
    import diffusers

    return getattr(diffusers, model.family.denoiser_class).from_pretrained(model.folder / model.family.component).eval()


def error(actual, expected):
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("kind", "guidance"),
    [
        ("dit", 1.0),
        ("pixart-512", 4.0),
        *(pytest.param(kind, 1.0, marks=slow) for kind in zoo.PIPELINES if kind not in ("dit", "sd-v")),
        *(pytest.param(kind, 4.0, marks=slow) for kind in ("dit", "sd", "sdxl", "pixart", "pixart-1024", "sana")),
    ],
)
def test_every_family_equals_torch(converted, kind, guidance):
    traced, symbolic, file = converted(kind, guidance)
    denoiser = denoiser_of(traced.model)
    for batch in (1, 2):
        path = static(symbolic, batch, file)
        onnx.checker.check_model(str(path), full_check=True)
        given = drawn(traced, batch)
        expected = torch_epsilon(traced, denoiser, torch.float32, *given)
        assert error(onnx_epsilon(path, torch.float32, *given), expected) <= 1e-4


@slow
@pytest.mark.parametrize("kind", ["dit", "sd", "sdxl", "pixart"])
def test_half_is_as_close_to_float32_as_torch_is(converted, kind):
    traced, symbolic, file = converted(kind, 4.0, torch.float16)
    path = static(symbolic, 1, file)
    onnx.checker.check_model(str(path), full_check=True)
    given = drawn(traced, 1)
    expected = torch_epsilon(traced, denoiser_of(traced.model), torch.float32, *given)
    in_torch = torch_epsilon(traced, denoiser_of(traced.model), torch.float16, *given)
    in_onnx = onnx_epsilon(path, torch.float16, *given)
    assert in_onnx.dtype == np.float32
    assert 0 < error(in_onnx, expected) <= 2 * error(in_torch, expected) + 1e-4


@pytest.mark.parametrize("kind", ["dit", pytest.param("sdxl", marks=slow)])
def test_bfloat16_is_valid(converted, kind):
    _, symbolic, file = converted(kind, 4.0, torch.bfloat16)
    path = static(symbolic, 1, file)
    onnx.checker.check_model(str(path), full_check=True)
    graph = onnx.load(str(path), load_external_data=False).graph
    types = {value.name: value.type.tensor_type.elem_type for value in [*graph.input, *graph.output]}
    outer = {types.pop(name) for name in ("latent", "timestep", "epsilon")}
    assert outer == {onnx.TensorProto.FLOAT}
    features = {kind for name, kind in types.items() if name.startswith("feature.")}
    assert features == {onnx.TensorProto.BFLOAT16}


def test_whole_operators_stay_and_no_weight_is_copied(converted):
    traced, symbolic, file = converted("sd", 4.0)
    graph = onnx.load(str(static(symbolic, 1, file)), load_external_data=False).graph
    operators = [node.op_type for node in graph.node]
    denoiser = denoiser_of(traced.model)
    attentions = sum(name.endswith(("attn1", "attn2")) for name, _ in denoiser.named_modules())
    norms = sum(isinstance(module, torch.nn.GroupNorm) for module in denoiser.modules())
    assert operators.count("Attention") == attentions
    assert operators.count("GroupNormalization") == norms
    assert "SequenceAt" not in operators
    assert sum(len(tensor.raw_data) for tensor in graph.initializer if tensor.data_location == 0) < 4096


def test_a_graph_does_not_depend_on_what_the_weights_hold(converted, tmp_path):
    """Simplified without the checkpoint: whoever reads a weight here fails."""
    _, symbolic, _ = converted("unconditional", 1.0)
    for value in symbolic.graph.initializers.values():
        held = value.const_value
        if isinstance(held, ir.ExternalTensor):
            value.const_value = ir.ExternalTensor(
                "absent", held.offset, held.length, held.dtype, shape=held.shape, name=held.name, base_dir=tmp_path
            )
    simplify(symbolic)


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
    quotient, same, squeezed = session.run(["a", "b", "c"], {"x": x})
    assert np.array_equal(quotient, x)  # 0 / 1e-15; without the addend it is no number
    assert np.array_equal(same, x)
    assert np.array_equal(squeezed, x)
    assert {node.op_type for node in model.graph} <= {"Add", "Div", "Identity"}


def test_mending_twice_changes_nothing(converted):
    _, symbolic, _ = converted("pixart-512", 4.0)
    before = [node.op_type for node in symbolic.graph]
    MEND(symbolic)
    assert [node.op_type for node in symbolic.graph] == before
    assert "Expand" in before
