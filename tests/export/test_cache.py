"""Converted models on disk: the same program once, never another's graph, nothing that is damaged."""

import multiprocessing
import os

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

from export.onnx import cache, convert
from export.onnx.convert import convert as convert_at
from export.onnx.convert import export_module


class Scaled(nn.Module):
    def __init__(self, factor=2.0, table=(1.0, 2.0, 3.0), width=3):
        super().__init__()
        self.layer = nn.Linear(3, width)
        self.factor = factor
        self.register_buffer("table", torch.tensor(table))

    def forward(self, x):
        return x * self.factor + self.table, self.layer(x)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(cache.SWITCH, raising=False)
    return tmp_path / "dipgo" / "converted"


@pytest.fixture
def conversions(monkeypatch):
    """What was converted, and not read."""
    seen, original = [], convert._converted

    def count(what, *rest):
        seen.append(what)
        return original(what, *rest)

    monkeypatch.setattr(convert, "_converted", count)
    return seen


def graph(module=None, rows=2, outputs=("y", "z")):
    program = export_module("it", (module or Scaled()).eval(), [torch.ones(rows, 3)])
    return convert_at("it", program, ["x"], outputs, (rows, 3))


def result(model):
    """Return the first output, which no parameter decides."""
    extracted = ir.convenience.extract(model.graph, ["x"], ["y"])
    session = onnxruntime.InferenceSession(ir.to_proto(ir.Model(extracted, ir_version=10)).SerializeToString())
    return session.run(["y"], {"x": np.ones((2, 3), np.float32)})[0]


def test_a_program_is_converted_once_whatever_its_weights(conversions, folder):
    first, second = graph(), graph()
    assert conversions == ["it"]
    assert ir.to_proto(first).SerializeToString() == ir.to_proto(second).SerializeToString()
    np.testing.assert_array_equal(result(second), [[3, 4, 5]] * 2)
    held = second.graph.initializers["layer.weight"].const_value
    assert isinstance(held, ir.ExternalTensor)
    assert tuple(held.shape) == (3, 3)
    assert len(list(folder.iterdir())) == 1


def test_what_decides_the_graph_makes_another(conversions, monkeypatch):
    made = graph()
    monkeypatch.setattr(convert, "_converted", lambda what, *rest: conversions.append(what) or made.clone())
    monkeypatch.setattr(convert, "specialise", lambda *_: None)  # only what is asked for counts
    for other, changes in (
        (Scaled(factor=2.5), {}),
        (Scaled(table=(1.0, 2.0, 3.5)), {}),
        (Scaled(width=4), {}),
        (Scaled(), {"rows": 1}),
        (Scaled(), {"outputs": ("y", "w")}),
    ):
        graph(other, **changes)
    monkeypatch.setattr(cache, "_code", lambda: ["another version"])
    graph()
    assert conversions == ["it"] * 7


def test_a_damaged_file_is_made_again(conversions, folder):
    graph()
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole[:40] + b"x" + whole[41:]):
        file.write_bytes(damaged)
        np.testing.assert_array_equal(result(graph()), [[3, 4, 5]] * 2)
        assert file.read_bytes() == whole
    assert conversions == ["it"] * 3


def test_it_can_be_switched_off_and_does_without_a_folder(conversions, folder, monkeypatch, tmp_path):
    monkeypatch.setenv(cache.SWITCH, "off")
    np.testing.assert_array_equal(result(graph()), [[3, 4, 5]] * 2)
    assert not folder.exists()
    monkeypatch.delenv(cache.SWITCH)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    np.testing.assert_array_equal(result(graph()), [[3, 4, 5]] * 2)
    assert conversions == ["it", "it"]


def test_the_longest_unused_goes_first(folder, monkeypatch):
    model = graph()
    (file,) = folder.iterdir()
    size = file.stat().st_size
    monkeypatch.setattr(cache, "LIMIT", int(2.5 * size))
    os.utime(file, (1, 1))
    for number in range(2):
        cache.cached([number], lambda: model)
    assert len(list(folder.iterdir())) == 2
    assert not file.exists()
    (kept, _) = sorted(folder.iterdir())
    os.utime(kept, (1, 1))
    for number in range(2):
        cache.cached([number], lambda: pytest.fail("it is there"))  # reading renews it
    cache.cached([2], lambda: model)
    assert len(list(folder.iterdir())) == 2


def _many(_):
    torch.set_num_threads(1)
    return len(list(graph().graph))


def test_processes_that_convert_the_same_do_not_disturb_each_other(folder):
    with multiprocessing.get_context("fork").Pool(3) as pool:
        assert pool.map(_many, range(6)) == [len(list(graph().graph))] * 6
    assert [path.suffix for path in folder.iterdir()] == [".onnx"]
