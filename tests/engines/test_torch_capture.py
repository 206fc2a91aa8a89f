"""A trajectory of torch's backend as one CUDA graph, without a GPU: a stand-in records operators and runs them again.

As in a CUDA graph, every tensor keeps its place: a replay computes into the tensors that there were while it was
captured, from whatever the buffers hold by then.
"""

import inspect
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import dipgo
from engines.torchrt.capture import Capture
from tests import zoo
from tests.models import random_subnet

REAL_GRAPH = torch.cuda.graph


class Recorder(TorchDispatchMode):
    """A CUDA graph."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        self.calls.append((function, arguments, options or {}, result))
        return result

    def replay(self):
        for function, arguments, options, result in self.calls:
            again = function(*arguments, **options)
            for old, new in zip(pytree.tree_leaves(result), pytree.tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def gpu(monkeypatch):
    """torch.cuda as far as captures call it; ``captures`` counts them, ``fails`` has them refused."""
    state = SimpleNamespace(captures=0, fails=False)
    stream = SimpleNamespace(wait_stream=lambda other: None)

    @contextmanager
    def graph(cuda_graph, pool=None, stream=None, capture_error_mode="global"):
        state.captures += 1
        if state.fails:
            raise RuntimeError("CUDA error: operation not permitted\nwhen stream is capturing")
        with cuda_graph:
            yield

    own = list(inspect.signature(graph).parameters)
    assert own == list(inspect.signature(REAL_GRAPH).parameters)[: len(own)]
    for name, value in {
        "Stream": lambda device: stream,
        "current_stream": lambda: stream,
        "graph_pool_handle": lambda: (0, 1),
        "device": nullcontext,
        "stream": nullcontext,
        "CUDAGraph": Recorder,
        "graph": graph,
    }.items():
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, value)
    return state


@pytest.fixture(scope="module")
def bundle():
    traced, sampler = zoo.trace("dit"), zoo.sampler("dit", 5)
    return zoo.bundle(traced, sampler, random_subnet(traced, sampler, seed=0, terms=2, channels=2))


@pytest.fixture
def program(bundle, gpu):
    with dipgo.load(bundle, backend="torch", device="cpu") as entered:
        entered.runner._capture = Capture(torch.device("cpu"))  # as on a GPU
        yield entered


def test_one_launch_computes_what_the_steps_do_for_any_noise_and_class(program, gpu):
    for seed, label in ((0, 1), (1, 2), (0, 1)):
        noise, conditions = program.noise(1, seed), program.conditions([label])
        before = program.contexts.launches
        whole = program.denoise(noise, conditions)
        assert program.contexts.launches == before + 1
        assert np.array_equal(whole, program.denoise(noise, conditions, lambda step, epsilon: None))
    assert gpu.captures == 1


def test_where_it_cannot_be_captured_it_runs_step_by_step(program, gpu):
    gpu.fails = True
    noise, conditions = program.noise(1, 0), program.conditions([1])
    with pytest.warns(UserWarning, match="no CUDA graph of .*, it runs step by step: CUDA error: .* capturing"):
        latents = program.denoise(noise, conditions)
    gpu.fails = False
    assert np.array_equal(latents, program.denoise(noise, conditions))
    assert gpu.captures == 1
