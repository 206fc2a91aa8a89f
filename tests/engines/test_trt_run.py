"""Running on TensorRT, without a GPU: the real runner on a stand-in that computes with ONNX Runtime (fake_tensorrt)."""

import gc
import json
import re
import shutil
import sys
import weakref

import numpy as np
import pytest

import dipgo
from engines.cuda.runtime import Device, bindings
from engines.serving.repository import Deployment, write_repository
from engines.trt import build as building
from engines.trt.build import build
from engines.trt.library import find_library
from engines.trt.loader import BuildOptions
from engines.trt.runner import TensorRtRunner
from export.bundle import open_bundle
from export.compiler import write_bundle
from tests import zoo
from tests.checks import in_threads, refused
from tests.engines.fake_cuda import FakeCuda
from tests.engines.fake_tensorrt import FakeTensorRt
from tests.engines.tensorrt_api import API, NotInTheApi, check_call, check_name
from tests.models import random_subnet

REAL_RUNTIME = bindings


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A bundle, into which engines are built, and its images by ONNX Runtime."""
    traced, sampler, folder = zoo.trace("dit"), zoo.sampler("dit", 5), tmp_path_factory.mktemp("trt") / "b"
    shutil.copytree(zoo.bundle(traced, sampler, random_subnet(traced, sampler, seed=0, terms=2, channels=2)), folder)
    with dipgo.load(folder, threads=1) as program:
        return folder, {seed: program.generate([0, 1], seed) for seed in (1, 2)}


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda()
    monkeypatch.setattr("engines.cuda.runtime.bindings", lambda: fake)
    return fake


@pytest.fixture
def trt(monkeypatch, cuda, tmp_path):
    fake = FakeTensorRt(cuda)
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # children of this process would not have the stand-in
    monkeypatch.setattr(building, "build_all", lambda tasks, workers: map(building.make_engine, tasks))
    return fake


@pytest.fixture
def bundle(made, trt):
    folder, _ = made
    opened = open_bundle(folder)
    build(opened, force=True)
    return opened


def images(bundle, seed=1):
    with dipgo.load(bundle.folder, backend="tensorrt") as program:
        return program.generate([0, 1], seed)


def test_images_are_those_of_onnx_runtime(made, bundle, cuda):
    """The whole trajectory is one launch of a CUDA graph, an image; and steps one by one where somebody looks on."""
    _, expected = made
    with dipgo.load(bundle.folder, backend="tensorrt") as program:
        assert np.abs(program.generate([0, 1], 1) - expected[1]).max() <= 1e-6
        assert program.contexts.launches == 2
        assert cuda.launched.count("graph") == 2
        noise, conditions = program.noise(1, 3), program.conditions([2])
        whole = program.denoise(noise, conditions)
        seen = []
        stepwise = program.denoise(noise, conditions, after_step=lambda step, epsilon: seen.append(step))
        assert seen == list(range(5))
        assert np.array_equal(whole, stepwise)
        assert program.runner.label == "tensorrt 11.4.0.106, Fake GPU"
        for seed, pixels in in_threads(lambda seed: program.generate([0, 1], seed), (1, 2)).items():
            assert np.abs(pixels - expected[seed]).max() <= 1e-6


def test_steps_are_launched_one_by_one_where_capture_fails(made, bundle, cuda):
    cuda.can_capture = False
    with pytest.warns(UserWarning, match=r"no CUDA graph of .*, it runs step by step: .*: the launch failed"):
        pixels = images(bundle)
    assert "graph" not in cuda.launched
    assert np.abs(pixels - made[1][1]).max() <= 1e-6


def test_all_contexts_use_one_arena_and_everything_is_freed(bundle, trt, cuda):
    with dipgo.load(bundle.folder, backend="tensorrt") as program:
        latent = program.denoise(program.noise(1, 0), program.conditions([0]))
        loop = {context._memory for context in trt.contexts}
        assert len(loop) == 1
        assert loop.pop()[1] == max(context._engine.device_memory_size_v2 for context in trt.contexts)
        program.decode(latent)
        assert np.array_equal(latent, program.denoise(program.noise(1, 0), program.conditions([0])))
    del program
    trt.contexts.clear()
    gc.collect()
    assert cuda.live == {}


def test_engines_go_before_the_stream_and_after_its_work(bundle, trt, cuda, monkeypatch):
    ends = []
    for name in ("cudaStreamSynchronize", "cudaStreamDestroy"):
        real = getattr(cuda, name)
        monkeypatch.setattr(cuda, name, lambda stream, name=name, real=real: (ends.append(name), real(stream))[1])
    with dipgo.load(bundle.folder, backend="tensorrt") as program:
        context = trt.contexts[0]
        trt.contexts.clear()
        weakref.finalize(context, ends.append, "context")
        del context
        ends.clear()
    assert ends.index("cudaStreamSynchronize") < ends.index("context") < ends.index("cudaStreamDestroy")
    with refused(r"the program is closed; enter it before use"):
        program.runner.zeros([1], "float32")
    program.close()
    cuda.capacity = 10_000
    line = r"GPU's memory is full: 0.00 GB needed, .* of .* GB free; export with --graphs"
    with refused(line), dipgo.load(bundle.folder, backend="tensorrt"):
        pass


def test_an_engine_that_is_missing_or_damaged_or_for_another_version_is_refused(made, bundle, trt, monkeypatch):
    _, expected = made
    engine = next(path for path in (bundle.folder / "engines").glob("*.engine") if "steps" in path.name)
    assert re.fullmatch(r"tiny-dit-steps-[0-9a-f]{8}-fp32-5\.tensorrt-11\.4\.0\.106\.sm90\.fp32\.engine", engine.name)
    good = engine.read_bytes()
    engine.write_bytes(b"x" * len(good))
    with refused(r"no whole engine .* run: dipgo build .* --backend tensorrt"):
        images(bundle)
    assert engine.with_name(f"{engine.name}.damaged").read_bytes() == b"x" * len(good)
    assert [one.path for one in build(bundle).engines if one.is_new] == [engine]
    assert np.abs(images(bundle) - expected[1]).max() <= 1e-6
    monkeypatch.setattr(trt, "__version__", "11.5")
    with refused(r"no whole engine of this graph for tensorrt 11.5 on this GPU"):
        images(bundle)


def test_stripped_engines_get_their_weights_from_the_graphs(made, bundle, trt):
    build(bundle, options=BuildOptions(strip=True))
    assert not trt.refitted
    assert np.abs(images(bundle) - made[1][1]).max() <= 1e-6
    assert sorted(trt.refitted) == sorted(path.name for path in bundle.folder.glob("*.onnx"))


def test_a_model_repository_holds_the_engines(made, bundle, tmp_path):
    """Whole ones alone, as they are: they run where they were copied to, and none is built again."""
    _, expected = made
    folder = shutil.copytree(bundle.folder, tmp_path / "b")
    (folder / "engines" / "interrupted.engine").write_bytes(b"half")
    model = write_repository(folder, tmp_path / "models", Deployment(backend="tensorrt"))
    copy = open_bundle(model / "1" / "bundle")
    whole = [engine.path.name for engine in build(bundle).engines]
    assert sorted(path.name for path in copy.folder.glob("engines/*.engine")) == sorted(whole)
    for name in whole:
        record = json.loads((copy.folder / "engines" / f"{name}.json").read_text())
        assert (copy.folder / "engines" / name).stat().st_mtime_ns == record["changed_ns"]  # spares reading it
    assert np.abs(images(copy) - expected[1]).max() <= 1e-6
    assert not any(engine.is_new for engine in build(copy).engines)


def test_timings_are_kept_for_the_next_build_and_a_damaged_file_is_kept_aside(bundle, tmp_path):
    file = tmp_path / "cache" / "dipgo" / "tensorrt" / "tensorrt-11.4.0.106.sm90.timing"
    every = {path.stem for path in bundle.folder.glob("*.onnx")}
    assert set(file.read_text().split()[1:]) == every
    plans = [path.read_text() for path in (bundle.folder / "engines").glob("*.engine")]
    assert all('"tf32": false' in plan for plan in plans)
    file.write_text("timings earlier")
    build(bundle, force=True)
    assert set(file.read_text().split()[1:]) == every | {"earlier"}
    file.write_text("rubbish")
    build(bundle, force=True)
    assert set(file.read_text().split()[1:]) == every
    assert file.with_name(f"{file.name}.damaged").read_text() == "rubbish"


def test_batches_of_several_sizes_share_the_engines(trt, tmp_path):
    """A dynamic batch: contexts of one and of three images take turns on the same engines."""
    traced, sampler, folder = zoo.trace("dit"), zoo.sampler("dit", 4), tmp_path / "b"
    write_bundle(zoo.converted(traced, "1:2:3"), random_subnet(traced, sampler, seed=1), sampler, folder)
    build(open_bundle(folder))
    with dipgo.load(folder, threads=1) as program:
        expected = {count: program.generate(list(range(count)), 5) for count in (1, 3)}
    with dipgo.load(folder, backend="tensorrt") as program:
        for count in (1, 3, 1, 3):
            pixels = program.generate(list(range(count)), 5)
            assert np.abs(pixels - expected[count]).max() <= 1e-6
        with refused(r"not built for '.*' of shape \[7\]"):
            program.runner.run(program.record.prologues[0].file, {"class_labels": np.zeros(7, np.int32)})


def test_without_a_gpu_it_is_said_that_engines_were_built_not_run(made):
    pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-bindings: pip install -e '.[tensorrt-rtx]'")
    from engines.cuda.runtime import find_device

    if find_device():
        pytest.skip("there is a GPU")
    folder, _ = made
    reason = r"built here, not run: no GPU can be used here \(.*\).*or use --backend onnxr"
    with refused(reason), TensorRtRunner(open_bundle(folder)):
        pass
    program = dipgo.load(folder, backend="tensorrt")
    program.close()  # never opened
    with refused(reason):
        program(class_labels=[1])
    program.close()


def test_without_cuda_bindings_nothing_is_built(made, trt, monkeypatch):
    """Full TensorRT is here, and nobody can tell whether a GPU is: neither "build there" nor engines of RTX."""
    monkeypatch.setattr("engines.cuda.runtime.bindings", REAL_RUNTIME)
    monkeypatch.setitem(sys.modules, "cuda", None)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", trt)
    with refused(r"^cuda-bindings is not installed; run: pip install 'cuda-bindings"):
        build(open_bundle(made[0]), force=True)


def test_which_tensorrt_is_used(trt, monkeypatch):
    gpu = Device("Fake GPU", 90, 10**9)
    assert find_library(gpu).name == "tensorrt"
    assert find_library(gpu).target(gpu) == "sm90"
    with refused("builds engines on the GPU that they are for, and none can be used here"):
        find_library(gpu).target(None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", trt)
    assert find_library(None).name == "tensorrt-rtx"
    assert find_library(None).target(gpu) == "sm80plus"
    with refused(r"need compute capability 8\.0, this one has 7\.5"):
        find_library(None).target(Device("Old GPU", 75, 10**9))
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    with refused("TensorRT is not installed; run: pip install"):
        find_library(gpu)


def test_the_stand_in_knows_what_the_versions_share(trt):
    """What the other tests lean on: names and calls that one version lacks are refused."""
    check_call("ICudaEngine", "create_execution_context", (), {})
    config = trt.Builder(None).create_builder_config()
    for call, message in (
        (lambda: check_name("ComputeCapability", "CURRENT"), r"ComputeCapability.CURRENT is not in TensorRT 10.16"),
        (lambda: trt.BuilderFlag.FP16, r"BuilderFlag.FP16 is not in TensorRT 11.4"),
        (lambda: check_call("IExecutionContext", "set_device_memory", (1,), {}), "is called with"),
        (lambda: check_call("ICudaEngine", "num_io_tensors", (), {}), "is no method"),
        (lambda: setattr(config, "num_compute_capabilities", 1), r"IBuilderConfig.num_compute_capabilities"),
    ):
        with refused(message, NotInTheApi):
            call()


def test_the_record_of_tensorrt_rtx_is_right():
    module = pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx: pip install -e '.[tensorrt-rtx]'")
    if module.__version__ not in API:
        pytest.skip(f"version {module.__version__} is not recorded")
    for kind, members in API[module.__version__].items():
        for name in members:
            assert hasattr(getattr(module, kind), name), f"{kind}.{name}"
