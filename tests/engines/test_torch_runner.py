"""The torch backend on real bundles: it agrees with ONNX Runtime, in every layout and precision, and is a program."""

import numpy as np
import onnxruntime
import pytest
import torch

import dipgo
from benchmarks.bench.parity import verify
from benchmarks.bench.subjects import encodes
from dipgo.base.errors import DipgoError
from dipgo.base.progress import silent
from engines.torchrt.loader import module_from_graph
from engines.torchrt.weights import Weights
from export.bundle import open_bundle
from export.plan.layouts import LAYOUTS
from tests import zoo
from tests.checks import error, in_threads
from tests.models import random_subnet

STEPS = 4
FLOWS = ("flux-schnell", "sd3", "sana", "cogview4")
REGISTERED = ("dit", "sd", "sdxl", "pixart")  # the others are flows, with a sampler of their own


def bundle(kind, layout, dtype=torch.float32):
    """Compile a random SubNet with learned backups."""
    own = "ddim" if kind in REGISTERED else None
    traced, sampler = zoo.trace(kind, dtype=dtype), zoo.sampler(kind, STEPS, own)
    return zoo.bundle(traced, sampler, random_subnet(traced, sampler, 2, 0.5, 2, 2), layout)


def given(record):
    return [1] if record.conditioning.kind == "class" else ["a red fox"]


def latent_and_pixels(folder, backend):
    with dipgo.load(folder, backend=backend) as program:
        if encodes(program):
            latent = program.denoise(program.noise(1, 0), program.conditions(given(program.record)))
            return latent, program.generate(given(program.record), 0)
        rng, shapes = np.random.default_rng(0), program.record.conditioning.inputs
        embeddings = {each.name: rng.standard_normal(each.shape).astype(each.dtype) for each in shapes}
        latent = program.denoise(program.noise(1, 0), embeddings)
        return latent, program.decode(latent)


@pytest.fixture(scope="module")
def dit():
    return {layout: bundle("dit", layout) for layout in LAYOUTS}


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_every_layout_agrees(dit, layout):
    expected = latent_and_pixels(dit[layout], "onnxruntime")
    for one, other in zip(latent_and_pixels(dit[layout], "torch-cpu"), expected, strict=True):
        assert error(one, other) <= 1e-4


@pytest.mark.parametrize(
    ("kind", "dtype", "layout", "tolerance"),
    [
        ("sd", torch.float32, "segment", 1e-4),
        pytest.param("sdxl", torch.float32, "signature", 1e-4, marks=pytest.mark.slow),
        ("pixart", torch.float16, "step", 2e-2),
        ("flux", torch.float32, "signature", 1e-4),
        *(pytest.param(kind, torch.float32, "signature", 1e-4, marks=pytest.mark.slow) for kind in FLOWS),
    ],
)
def test_every_family_agrees(kind, dtype, layout, tolerance):
    """Text encoders, UNets, masked attention and VAE decoders."""
    folder = bundle(kind, layout, dtype)
    expected = latent_and_pixels(folder, "onnxruntime")
    for one, other in zip(latent_and_pixels(folder, "torch-cpu"), expected, strict=True):
        assert error(one, other) <= tolerance


def test_bfloat16_runs(dit):
    """ONNX Runtime's CPU has no bfloat16, so against float32: off by its eight bits, not by more, not by less."""
    expected = latent_and_pixels(dit["signature"], "onnxruntime")
    half = bundle("dit", "signature", torch.bfloat16)
    assert {slot.dtype for slot in open_bundle(half).record.slots} >= {"bfloat16"}
    for one, other in zip(latent_and_pixels(half, "torch-cpu"), expected, strict=True):
        assert 1e-4 < error(one, other) < 5e-2
    with pytest.raises(DipgoError, match=r"ONNX Runtime's CPU has no bfloat16: .*, or give --backend torch"):
        latent_and_pixels(half, "onnxruntime")
    parity = verify(half, progress=silent, backend="torch-cpu")
    assert parity.passed
    assert parity.dtype == "bfloat16"


def test_it_is_a_program_like_any_other(dit):
    """Steps one by one, several threads, calls one after the other."""
    with dipgo.load(dit["signature"], backend="torch-cpu") as program:
        seen = []
        conditions = program.conditions([1])
        watched = program.denoise(program.noise(1, 0), conditions, lambda *step: seen.append(step[0]))
        assert seen == list(range(STEPS))
        assert np.array_equal(watched, program.denoise(program.noise(1, 0), conditions))

        for seed, images in in_threads(lambda seed: program.generate([0, 1], seed), (1, 2)).items():
            assert np.array_equal(images, program.generate([0, 1], seed))


def test_weights_are_in_memory_once(dit):
    """Graphs hold the same tensors, each a part of a file that is mapped once."""
    weights = Weights(dit["step"], torch.device("cpu"))
    graphs = [module_from_graph(path, weights) for path in sorted(dit["step"].glob("*.onnx"))]
    held = [buffer for graph in graphs for name, buffer in graph.module.named_buffers() if name.startswith("weight")]
    distinct = {id(buffer): buffer for buffer in held}
    assert len(distinct) < len(held)
    assert len({(buffer.data_ptr(), buffer.shape) for buffer in held}) == len(distinct)
    files = {file.stat().st_size for file in dit["step"].glob("**/*.safetensors")}
    assert {buffer.untyped_storage().nbytes() for buffer in held} <= files


@pytest.mark.parametrize("backend", ["onnxruntime-cuda", "onnxruntime-tensorrt"])
def test_without_a_cuda_provider_one_line_says_so(dit, backend):
    provider = {"onnxruntime-cuda": "CUDAExecutionProvider"}.get(backend, "TensorrtExecutionProvider")
    if provider in onnxruntime.get_available_providers():
        pytest.skip("it is here")
    cure = rf"this onnxruntime has no {provider}; run: pip uninstall onnxruntime; pip install 'dipgo\[cuda\]'"
    with pytest.raises(DipgoError, match=cure):
        dipgo.load(dit["signature"], backend=backend)
