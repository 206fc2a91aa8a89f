"""The torch and the ONNX Runtime backends on a GPU."""

import shutil
import warnings

import numpy as np
import onnxruntime
import pytest
import torch

import dipgo
from engines.torchrt.aot import build
from export.bundle import open_bundle
from tests import zoo
from tests.checks import error, in_threads
from tests.models import random_subnet

ON_GPU = [
    "torch",
    pytest.param(
        "onnxruntime-cuda",
        marks=pytest.mark.skipif(
            "CUDAExecutionProvider" not in onnxruntime.get_available_providers(), reason="needs onnxruntime-gpu"
        ),
    ),
    "torch-compile",
    "torch-aot",
]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A copy, into which packages are built."""
    traced, sampler = zoo.trace("dit"), zoo.sampler("dit", 4)
    made = zoo.bundle(traced, sampler, random_subnet(traced, sampler, 2, 0.5, 2, 2))
    return shutil.copytree(made, tmp_path_factory.mktemp("cuda") / "b")


@pytest.fixture(scope="module")
def packages(bundle):
    """The bundle's AOTInductor packages: minutes of compiling, so only for those who run them."""
    build(open_bundle(bundle), torch.device("cuda"))


@pytest.fixture
def backend(request):
    if request.param == "torch-aot":
        request.getfixturevalue("packages")
    return request.param


@needs_cuda
@pytest.mark.parametrize("backend", ON_GPU, indirect=True)
def test_cuda_agrees_with_the_cpu(bundle, backend):
    with dipgo.load(bundle, backend="onnxruntime") as program:
        expected = program.generate([0, 1], 3)
    with dipgo.load(bundle, backend=backend) as program:
        assert error(program.generate([0, 1], 3), expected) <= 1e-4


@needs_cuda
@pytest.mark.parametrize("backend", ON_GPU, indirect=True)
def test_a_cuda_graph_equals_its_launches(bundle, backend):
    """Bit for bit: with somebody looking after each step it runs launch by launch, else as one launch."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "no CUDA graph")  # no falling back
        with dipgo.load(bundle, backend=backend) as program:
            noise, conditions = program.noise(1, 0), program.conditions([1])
            stepwise = program.denoise(noise, conditions, lambda step, epsilon: None)
            before = program.contexts.launches
            assert np.array_equal(program.denoise(noise, conditions), stepwise)
            assert program.contexts.launches == before + 1
            other = program.denoise(program.noise(1, 1), program.conditions([2]))
            assert not np.array_equal(other, stepwise)
            assert np.array_equal(program.denoise(noise, conditions), stepwise)


@needs_cuda
@pytest.mark.parametrize("backend", ON_GPU, indirect=True)
def test_cuda_takes_two_threads(bundle, backend):
    with dipgo.load(bundle, backend=backend) as program:
        made = in_threads(lambda seed: [program.generate([0, 1], seed) for _ in range(3)], (1, 2))
        for seed in made:
            assert all(np.array_equal(images, program.generate([0, 1], seed)) for images in made[seed])
