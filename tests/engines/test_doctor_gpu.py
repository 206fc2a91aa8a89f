"""`dipgo doctor` about GPUs and servers, in real processes; the machine's GPU is an nvidia-smi that lists one."""

import json
import os

import pytest

from tests.checks import ROOT, python
from tests.test_doctor import SCRIPT

GPU = "Fake GPU, 9.0, 1000 MiB, 1.0"


def found(tmp_path, blocked="", **environment):
    """Return the findings where what lies in a folder is imported first, and one package not at all."""
    given = os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"} | environment
    return json.loads(python(SCRIPT, "--json", without=blocked, env=given, cwd=ROOT).stdout)


def package(folder, text=""):
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(text)


def nvidia_smi(tmp_path, lists):
    """Return a PATH that begins with an nvidia-smi."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\necho '{lists}'\n")
    (folder / "nvidia-smi").chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def providers(tmp_path):
    """Put an onnxruntime with the provider for CUDA before the real one."""
    package(tmp_path / "onnxruntime", "def get_available_providers(): return ['CUDAExecutionProvider']")


def bindings(tmp_path, count):
    """Put cuda-bindings before the real ones that find so many devices."""
    package(tmp_path / "cuda")
    package(tmp_path / "cuda" / "bindings")
    (tmp_path / "cuda" / "bindings" / "runtime.py").write_text(
        "import sys\nfrom tests.engines.fake_cuda import FakeCuda\n\n\nclass Some(FakeCuda):\n"
        f"    def cudaGetDeviceCount(self): return 0, {count}\n\n\nsys.modules[__name__] = Some()\n"
    )
    return f"{tmp_path}{os.pathsep}{ROOT}"


@pytest.mark.parametrize("lists", [GPU, ""])
def test_missing_bindings_are_told_and_how_to_install_them(tmp_path, lists):
    """With a GPU and without one: engines are not even built then."""
    providers(tmp_path)
    package(tmp_path / "tensorrt")
    package(tmp_path / "cuda")  # without bindings, and before the real ones
    backends = found(tmp_path, PATH=nvidia_smi(tmp_path, lists))["backends"]
    for name in ("tensorrt", "onnxruntime-cuda"):
        assert backends[name].startswith("cuda-bindings is not installed; run: pip install 'cuda-bindings")


@pytest.mark.parametrize("count", [1, 0])
def test_a_gpu_is_usable_where_the_bindings_find_it(tmp_path, count):
    providers(tmp_path)
    package(tmp_path / "tensorrt")
    path = bindings(tmp_path, count)
    backends = found(tmp_path, PATH=nvidia_smi(tmp_path, GPU), PYTHONPATH=path)["backends"]
    if count:
        assert (backends["tensorrt"], backends["onnxruntime-cuda"]) == ("usable", "usable")
    else:
        assert backends["onnxruntime-cuda"].startswith("no GPU can be used here (no CUDA device)")


@pytest.mark.parametrize(
    ("name", "other", "expected"),
    [
        ("tensorrt_rtx", "tensorrt", "engines can be built; running them needs a CUDA device, there is none"),
        ("tensorrt", "tensorrt_rtx", "needs a CUDA device, there is none"),
    ],
)
def test_only_one_tensorrt_builds_without_a_gpu(tmp_path, name, other, expected):
    package(tmp_path / name)
    path = bindings(tmp_path, 0)
    assert found(tmp_path, other, PATH=nvidia_smi(tmp_path, ""), PYTHONPATH=path)["backends"]["tensorrt"] == expected


def test_a_server_that_is_not_there_is_not_shown(tmp_path):
    nowhere = tmp_path / "nope"
    told = found(tmp_path, TRITON_SERVER=str(nowhere))
    assert told["triton"] is None
    assert told["triton_missing"].startswith(f"{nowhere}: holds no tritonserver; run: ")
    server = tmp_path / "root" / "bin" / "tritonserver"
    (tmp_path / "root" / "backends" / "python").mkdir(parents=True)
    server.parent.mkdir()
    server.touch()
    assert found(tmp_path, TRITON_SERVER=str(tmp_path / "root"))["triton"] == str(server)
