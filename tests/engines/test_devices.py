"""Which device a backend runs on, and which backend is the best on a GPU; GPUs are stand-ins."""

import shutil
import sys

import pytest
import torch

import dipgo
from engines.backends import BACKENDS
from engines.best import ORDER, best_on_gpu
from engines.devices import Place, place_of
from engines.trt import build as building
from engines.trt.build import build
from export.bundle import open_bundle
from tests import zoo
from tests.checks import misused, refused
from tests.command import dipgo as command
from tests.engines.fake_cuda import FakeCuda
from tests.engines.fake_onnxruntime import FakeOnnxRuntime
from tests.engines.fake_tensorrt import FakeTensorRt
from tests.models import random_subnet


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A copy, into which engines are built."""
    traced, sampler = zoo.trace("dit"), zoo.sampler("dit", 5)
    made = zoo.bundle(traced, sampler, random_subnet(traced, sampler, seed=0, terms=2, channels=2))
    return shutil.copytree(made, tmp_path_factory.mktemp("devices") / "b")


@pytest.fixture
def cuda(monkeypatch, tmp_path):
    fake = FakeCuda(count=2)
    monkeypatch.setattr("engines.cuda.runtime.bindings", lambda: fake)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return fake


def test_names_of_devices():
    assert [place_of(name) for name in ("cpu", "cuda", "cuda:12")] == [Place("cpu"), Place("cuda"), Place("cuda", 12)]
    assert [str(place_of(name)) for name in ("cpu", "cuda:3")] == ["cpu", "cuda:3"]
    for name in ("gpu", "cuda:", "cuda:-1", "cpu:0", "cuda:1 ", ""):
        with misused(f"device '{name}': unknown; give cpu, cuda, or cuda:N"):
            place_of(name)


def test_a_device_is_of_a_kind_that_the_backend_runs_on(folder):
    with misused("device 'cuda:1': backend 'onnxruntime' does not run there; use one of tensorrt, onnxruntime-cuda"):
        dipgo.load(folder, device="cuda:1")
    with misused("device 'cpu': backend 'tensorrt' does not run there; use one of onnxruntime, torch, torch-cpu"):
        dipgo.load(folder, backend="tensorrt", device="cpu")
    with misused("device 'cpu': backend 'cuda' does not run there"):
        dipgo.load(folder, backend="cuda", device="cpu")
    with misused("unknown backend 'gpu'; use onnxruntime, .*, cuda"):
        dipgo.load(folder, backend="gpu")
    with dipgo.load(folder, backend="torch", device="cpu") as program:
        assert program.runner.device == torch.device("cpu")


def test_the_command_line_takes_it(folder, tmp_path):
    output = tmp_path / "a.png"
    assert command("run", folder, "--class", 1, "--device", "cpu", "-o", output).code == 0
    refusal = command("run", folder, "--class", 1, "--device", "cuda", "-o", tmp_path / "b.png")
    assert refusal.code == 2
    assert "device 'cuda': backend 'onnxruntime' does not run there" in refusal.err


def test_attach_takes_it(folder):
    pipe = zoo.task("dit", 5, "ddim").pipe
    with misused("device 'cuda': backend 'torch-cpu' does not run there"):
        dipgo.attach(pipe, folder, backend="torch-cpu", device="cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_torch_says_that_it_sees_none(folder):
    with misused(r"device 'cuda': torch sees no GPU here; give cpu"):
        dipgo.load(folder, backend="torch", device="cuda")


def test_a_stream_s_gpu_is_current_while_its_lock_is_held_and_no_longer(folder, cuda, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", FakeTensorRt(cuda))
    monkeypatch.setattr(building, "build_all", lambda tasks, workers: map(building.make_engine, tasks))
    build(open_bundle(folder), force=True)
    with dipgo.load(folder, backend="tensorrt", device="cuda:1") as program:
        program.generate([0], 1)
        with program.runner.stream.lock:
            assert cuda.current == 1
        assert cuda.current == 0
    assert set(cuda.places.values()) == {1}
    with misused("device 'cuda:2': there are 2 GPUs, 0 to 1"), dipgo.load(folder, backend="tensorrt", device="cuda:2"):
        pass


def test_the_best_is_the_first_that_can_run(folder, cuda, monkeypatch):
    """One after another goes: the engines, torch's GPU, the plugin, the providers."""
    assert ORDER.keys() < BACKENDS.keys()
    bundle, ort = open_bundle(folder), FakeOnnxRuntime(cuda)
    monkeypatch.setitem(sys.modules, "tensorrt", FakeTensorRt(cuda))
    monkeypatch.setitem(sys.modules, "onnxruntime", ort)
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_nv_tensorrt_rtx", ort.plugin)
    monkeypatch.setattr(building, "build_all", lambda tasks, workers: map(building.make_engine, tasks))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    build(bundle, force=True)
    assert best_on_gpu(bundle) == "tensorrt"
    shutil.rmtree(folder / "engines")
    assert best_on_gpu(bundle, Place("cuda", 1)) == "torch"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert best_on_gpu(bundle) == "onnxruntime-tensorrt-rtx"
    with dipgo.load(folder, backend="cuda", device="cuda:1") as program:
        assert program.runner.label == "ONNX Runtime TensorRT-RTX, Fake GPU"
    ort.rtx_devices = 0
    assert best_on_gpu(bundle) == "onnxruntime-tensorrt"
    ort.get_available_providers = lambda: ["CUDAExecutionProvider"]
    assert best_on_gpu(bundle) == "onnxruntime-cuda"
    ort.get_available_providers = list
    with refused(
        r"no backend can run this on a GPU here \(tensorrt: .*holds no engines for this GPU.*; torch: torch sees"
    ):
        best_on_gpu(bundle)
    with misused("device 'cuda:7': there are 2 GPUs, 0 to 1; give another"):
        best_on_gpu(bundle, Place("cuda", 7))
