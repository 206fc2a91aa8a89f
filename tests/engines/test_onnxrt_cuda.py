"""ONNX Runtime on GPUs, without one: the real runner on a stand-in that computes on the CPU (fake_onnxruntime)."""

import inspect
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest

import dipgo
from engines.onnxrt.providers import tensorrt_options
from export.bundle import open_bundle
from tests import zoo
from tests.checks import misused, refused
from tests.engines.fake_cuda import FakeCuda
from tests.engines.fake_onnxruntime import CUDA, RTX, TENSORRT, FakeOnnxRuntime
from tests.models import random_subnet

PROVIDERS = {"onnxruntime-cuda": CUDA, "onnxruntime-tensorrt": TENSORRT, "onnxruntime-tensorrt-rtx": RTX}


@pytest.fixture(scope="module")
def bundle():
    traced, sampler = zoo.trace("dit"), zoo.sampler("dit", 5)
    return zoo.bundle(traced, sampler, random_subnet(traced, sampler, seed=0, terms=2, channels=2))


@pytest.fixture(scope="module")
def expected(bundle):
    with dipgo.load(bundle, threads=1) as program:
        return program.generate([0, 1], 1)


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda(count=2)
    monkeypatch.setattr("engines.cuda.runtime.bindings", lambda: fake)
    return fake


@pytest.fixture
def ort(monkeypatch, cuda, tmp_path):
    fake = FakeOnnxRuntime(cuda)
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_nv_tensorrt_rtx", fake.plugin)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return fake


@pytest.mark.parametrize("device", [None, "cuda", "cuda:1"])
@pytest.mark.parametrize("backend", PROVIDERS)
def test_images_are_those_of_the_cpu_and_a_trajectory_is_one_launch(bundle, expected, cuda, ort, backend, device):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "no CUDA graph")
        with dipgo.load(bundle, backend=backend, device=device) as program:
            assert np.abs(program.generate([0, 1], 1) - expected).max() <= 1e-6
            assert cuda.launched.count("graph") == program.contexts.launches == 2
            assert program.runner.label.endswith("Fake GPU")
    index = int(device == "cuda:1")
    assert set(cuda.places.values()) == {index}
    assert cuda.current == 0  # as it was
    for provider, options in ort.given:
        assert provider == PROVIDERS[backend]
        assert options.get("device_id", str(index)) == str(index)
        assert options["user_compute_stream"] == "7"


def test_nodes_on_the_host_are_launched_step_by_step_with_a_warning(bundle, expected, cuda, ort):
    ort.on_host = {Path(file).stem for file in open_bundle(bundle).record.graphs}
    with (
        pytest.warns(UserWarning, match="no CUDA graph of the trajectory.* runs nodes of .* on the CPU"),
        dipgo.load(bundle, backend="onnxruntime-tensorrt-rtx") as program,
    ):
        assert np.abs(program.generate([0, 1], 1) - expected).max() <= 1e-6
    assert "graph" not in cuda.launched


def test_what_is_missing_is_said_in_one_line(bundle, ort, monkeypatch):
    with misused(r"device 'cuda:2': there are 2 GPUs, 0 to 1; give another"):
        dipgo.load(bundle, backend="onnxruntime-cuda", device="cuda:2")
    ort.rtx_devices = 0
    with refused(r"TensorRT-RTX's provider takes none of the GPUs here, not cuda:0; use --backend onnxruntime-cuda"):
        dipgo.load(bundle, backend="onnxruntime-tensorrt-rtx")
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_nv_tensorrt_rtx", None)
    with refused(r"onnxruntime_ep_nv_tensorrt_rtx .*; run: pip install 'dipgo\[cpu,onnxruntime-tensorrt-rtx\]'"):
        dipgo.load(bundle, backend="onnxruntime-tensorrt-rtx")


def test_a_plugin_that_cannot_be_loaded_is_one_line(bundle, ort, monkeypatch):
    """As the real plugin does where there is no driver."""

    def fail(name, path):
        raise RuntimeError("Failed to load library\nlibcuda.so.1: no such file")

    monkeypatch.setattr(ort, "register_execution_provider_library", fail)
    with refused(r"NvTensorRTRTX\w+ cannot be loaded \(Failed to load library libcuda.so.1: no such file\); run: pip"):
        dipgo.load(bundle, backend="onnxruntime-tensorrt-rtx")


def test_the_real_package_has_these_names_and_parameters():
    for name, _ in inspect.getmembers(FakeOnnxRuntime, inspect.isfunction):
        assert name.startswith("_") or callable(getattr(onnxruntime, name)), name
    assert callable(onnxruntime.SessionOptions.add_provider_for_devices)
    for name in ("bind_input", "bind_output"):
        parameters = list(inspect.signature(getattr(onnxruntime.IOBinding, name)).parameters)
        assert parameters[1:] == ["name", "device_type", "device_id", "element_type", "shape", "buffer_ptr"]
    assert list(inspect.signature(onnxruntime.InferenceSession).parameters)[:3] == [
        "path_or_bytes",
        "sess_options",
        "providers",
    ]
    assert hasattr(onnxruntime.get_ep_devices()[0], "ep_name")


@pytest.fixture
def options(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def options(sha256, dtype="float32"):
        return tensorrt_options(SimpleNamespace(sha256=sha256, dtype=dtype))

    return options


def test_bundles_share_timings_but_no_engines(options):
    """Two bundles of the same graphs with other weights: ONNX Runtime gives their engines one name."""
    first, second = options("a" * 64), options("b" * 64)
    engines = {given["trt_engine_cache_path"] for given in (first, second)}
    timings = {given["trt_timing_cache_path"] for given in (first, second)}
    assert (len(engines), len(timings)) == (2, 1)
    assert all(Path(folder).is_dir() for folder in engines | timings)
    assert options("a" * 64) == first


def test_precision_is_the_bundle_s(options):
    found = {dtype: options("a" * 64, dtype) for dtype in ("float32", "float16", "bfloat16")}
    given = {dtype: (each["trt_fp16_enable"], each["trt_bf16_enable"]) for dtype, each in found.items()}
    assert given == {"float32": ("0", "0"), "float16": ("1", "0"), "bfloat16": ("0", "1")}
