"""The torch backend on real bundles: it agrees with ONNX Runtime, in every layout and precision, and is a program."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime
import pytest
import torch
from diffusers import DDIMScheduler

import dipgo
from benchmarks.bench.parity import verify
from benchmarks.progress import silent
from dipgo.base.errors import DipgoError
from dipgo.graph.trace import trace
from dipgo.model.models import find_model
from dipgo.model.sampler import tabulate
from engines.torchrt.loader import module_from_graph
from engines.torchrt.weights import Weights
from export.bundle import open_bundle
from export.compiler import prepare, write_bundle
from export.config import ExportConfig
from export.plan.layouts import LAYOUTS
from tests.models import random_subnet, tiny_dit, tiny_pixart, tiny_sd, tiny_sdxl

STEPS = 4


def bundles(folder, make, dtype=torch.float32, layouts=tuple(LAYOUTS)):
    """Compile a random SubNet with learned backups, once a layout; returns the bundles' folders by layout."""
    model = find_model(str(make(folder / "model")))
    traced = trace(model, None, 4.0, dtype)
    sampler = tabulate(DDIMScheduler(clip_sample=False), STEPS, model.family.scales_noise)
    prepared = prepare(traced)
    subnet = random_subnet(traced, sampler, 2, 0.5, 2, 2)
    for layout in layouts:
        write_bundle(prepared, subnet, sampler, folder / layout, config=ExportConfig(graphs=layout))
    return {layout: folder / layout for layout in layouts}


def given(record):
    return [1] if record.conditioning.kind == "class" else ["a red fox"]


def latent_and_pixels(folder, backend):
    with dipgo.load(folder, backend=backend) as program:
        latent = program.denoise(program.noise(1, 0), program.conditions(given(program.record)))
        return latent, program.generate(given(program.record), 0)


def error(actual, expected):
    return np.linalg.norm(actual.astype(float) - expected) / np.linalg.norm(expected.astype(float))


@pytest.fixture(scope="module")
def dit(tmp_path_factory):
    return bundles(tmp_path_factory.mktemp("dit"), tiny_dit)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_every_layout_agrees(dit, layout):
    expected = latent_and_pixels(dit[layout], "onnxruntime")
    for one, other in zip(latent_and_pixels(dit[layout], "torch-cpu"), expected, strict=True):
        assert error(one, other) <= 1e-4


@pytest.mark.parametrize(
    ("make", "dtype", "layout", "tolerance"),
    [
        (tiny_sd, torch.float16, "segment", 2e-2),
        (tiny_sdxl, torch.float32, "signature", 1e-4),
        (tiny_pixart, torch.float16, "step", 2e-2),
    ],
)
def test_every_family_agrees(tmp_path, make, dtype, layout, tolerance):
    """Text encoders, UNets, masked attention and VAE decoders."""
    (folder,) = bundles(tmp_path, make, dtype, [layout]).values()
    expected = latent_and_pixels(folder, "onnxruntime")
    for one, other in zip(latent_and_pixels(folder, "torch-cpu"), expected, strict=True):
        assert error(one, other) <= tolerance


def test_bfloat16_runs(dit, tmp_path):
    """ONNX Runtime's CPU has no bfloat16, so against float32: off by its eight bits, not by more, not by less."""
    expected = latent_and_pixels(dit["signature"], "onnxruntime")
    half = bundles(tmp_path, tiny_dit, torch.bfloat16, ["signature"])["signature"]
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

        with ThreadPoolExecutor() as pool:
            results = dict(zip((1, 2), pool.map(lambda seed: program.generate([0, 1], seed), (1, 2)), strict=True))
        for seed in (1, 2):
            assert np.array_equal(results[seed], program.generate([0, 1], seed))


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
    cure = rf"this onnxruntime has no {provider}; run: pip uninstall onnxruntime && pip install 'onnxruntime-gpu.*"
    with pytest.raises(DipgoError, match=cure):
        dipgo.load(dit["signature"], backend=backend)
