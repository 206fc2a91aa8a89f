"""A fault in one node of one graph: the node is named, or the site that it is part of."""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper

from benchmarks.bench.parity import TOLERANCE
from benchmarks.debug import layers
from benchmarks.debug.debug import debug
from benchmarks.debug.differences import compare
from benchmarks.debug.graphs import producers, save_alone
from dipgo.base.errors import UsageError
from dipgo.graph.trace import trace
from dipgo.model.models import find_model
from dipgo.model.sampler import make_scheduler, tabulate
from dipgo.schedule.subnet import load_subnet
from engines.onnxrt import runner
from export.bundle import open_bundle
from export.compiler import compile_subnet, prepare, write_bundle
from tests import zoo
from tests.benchmarks.test_parity import reseal
from tests.checks import refused
from tests.command import dipgo
from tests.models import random_subnet

pytest.importorskip("polygraphy", reason="needs polygraphy: pip install -e '.[debug]'")


def wrong_constant(model, node):
    """Let the last input of a node, a bias or a factor, be one more."""
    shift = numpy_helper.from_array(np.ones((), np.float32), "fault")
    model.graph.initializer.append(shift)
    wrong = helper.make_node("Add", [node.input[-1], "fault"], ["wrong"])
    node.input[-1] = "wrong"
    insert(model, node, wrong)


def swapped_input(model, node):
    """Let an attention take its values for keys."""
    node.input[1], node.input[2] = node.input[2], node.input[1]


def overflow(model, node):
    """Scale what a node computes by the largest float16."""
    model.graph.initializer.append(numpy_helper.from_array(np.array(65504, np.float16), "fault"))
    after = helper.make_node("Mul", ["small", "fault"], [node.output[0]], name=node.name)
    node.output[0], node.name = "small", "small"
    insert(model, node, after, 1)


def insert(model, node, another, offset=0):
    model.graph.node.insert(list(model.graph.node).index(node) + offset, another)


def node_named(model, name):
    return next(node for node in model.graph.node if node.name == name)


def first_of(bundle, operator, step=0, site=""):
    """Return the graph of a step, and the last node of an operator before the output of a site."""
    record = open_bundle(bundle).record
    file = record.graphs[record.steps[step].launches[-1].graph].file
    model = onnx.load(bundle / file, load_external_data=False)
    names = [node.name for node in model.graph.node]
    end = next((names.index(node.name) for tensor, node in producers(model).items() if tensor == site), len(names))
    return file, next(node.name for node in reversed(model.graph.node[: end + 1]) if node.op_type == operator)


def miscompile(monkeypatch, file, name, fault, when=lambda model, node: True):
    """Let the backend put a fault into one node of one graph, whatever outputs the graph has beside its own."""

    def session(path, *_):
        model = onnx.load(path, load_external_data=False)
        node = node_named(model, name) if path.name in (file, "layers.onnx") else None
        if node and when(model, node):
            fault(model, node)
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(runner, "session_from_graph", session)


def export_wrongly(bundle, file, name, fault):
    """Put a fault into a bundle's own graph."""
    model = onnx.load(bundle / file, load_external_data=False)
    fault(model, node_named(model, name))
    (bundle / file).write_bytes(model.SerializeToString())
    reseal(bundle, file)


def table(path):
    with path.open() as stream:
        return list(csv.DictReader(stream))


def shipped(name, dtype=torch.float32):
    """Return the bundle of a random SubNet of a model that ships, of two steps."""

    def write(folder):
        traced = trace(find_model(name), "layer", 4.0, dtype)
        sampler = tabulate(make_scheduler("ddim", traced.model.pipeline().scheduler), 2)
        write_bundle(prepare(traced), random_subnet(traced, sampler, seed=2), sampler, folder)

    return zoo.once(f"bundles/debug-{name}-{str(dtype)[6:]}", write)


def tool(folder, command):
    """Run a command of the reproducer's page as it is written there."""
    text = (folder / "README.md").read_text()
    start = text.index(f"    polygraphy {command}")
    line = text[start : text.index("\n\n", start)].replace("\\\n", "")
    search = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(line, shell=True, cwd=folder, env=os.environ | search, capture_output=True, check=False)
    return done.returncode


@pytest.mark.parametrize(("operator", "fault"), [("LayerNormalization", wrong_constant), ("Attention", swapped_input)])
def test_a_node_that_a_backend_gets_wrong(bundle, tmp_path, monkeypatch, operator, fault):
    file, name = first_of(bundle, operator, step=2)
    miscompile(monkeypatch, file, name, fault)
    finding = debug(bundle, tmp_path / "d", TOLERANCE, None, "onnxruntime")
    assert f"{file}: onnxruntime leaves ONNX Runtime, first in node '{name}' ({operator})" in finding
    *before, last = table(tmp_path / "d" / "launches.csv")
    assert last["graph"] == file
    assert float(last["error"]) > TOLERANCE > max(float(row["error"]) for row in before)
    rows = table(tmp_path / "d" / "layers.csv")
    assert next(row["node"] for row in rows if row["holds"] == "False") == name
    assert tool(tmp_path / "d", "run") == 1


def test_the_program_that_diverges_is_named(bundle, tmp_path):
    """The second of two, of which one graph is wrong that only it runs."""
    subnet = load_subnet(bundle / "subnet.json")
    model = find_model(subnet.model.name)
    less = random_subnet(zoo.trace("dit", "layer", subnet.sampler.guidance_scale), zoo.sampler("dit", 3, None), 4)
    compile_subnet([subnet, less], model, both := tmp_path / "both")
    first, second = open_bundle(both).programs
    shared = {graph.file for graph in first.record.graphs.values()}
    graphs = [second.record.graphs[launch.graph].file for step in second.record.steps for launch in step.launches]
    file = next(each for each in graphs if each not in shared)
    nodes = onnx.load(both / file, load_external_data=False).graph.node
    name = next(node.name for node in reversed(nodes) if node.op_type == "LayerNormalization")
    export_wrongly(both, file, name, wrong_constant)
    finding = debug(both, tmp_path / "d", TOLERANCE, None, "onnxruntime")
    assert finding.startswith(f"3 steps at {second.record.budget:.0%}: ")
    assert file in finding


def test_a_node_that_is_wrong_only_where_it_is_fused(bundle, tmp_path, monkeypatch):
    file, name = first_of(bundle, "LayerNormalization")
    tensor = node_named(onnx.load(bundle / file, load_external_data=False), name).output[0]
    fused = lambda model, node: node.output[0] not in {value.name for value in model.graph.output}  # noqa: E731
    miscompile(monkeypatch, file, name, wrong_constant, fused)
    finding = debug(bundle, tmp_path / "d", TOLERANCE, None, "onnxruntime")
    readers = [
        node.name for node in onnx.load(bundle / file, load_external_data=False).graph.node if tensor in node.input
    ]
    assert f"first in node '{readers[0]}'" in finding


def test_a_wrong_export_names_its_site(bundle, tmp_path):
    site = "feature.transformer_blocks.1.attn1"
    file, name = first_of(bundle, "Attention", site=site)
    export_wrongly(wrong := shutil.copytree(bundle, tmp_path / "b"), file, name, swapped_input)
    finding = debug(wrong, tmp_path / "d", TOLERANCE, None, "onnxruntime")
    assert f"step 1, {file}: the graph leaves torch first in site '{site.removeprefix('feature.')}'" in finding
    rows = table(tmp_path / "d" / "layers.csv")
    assert rows[-1]["tensor"] == site
    assert name in {row["node"] for row in rows}
    assert len(rows) < len(onnx.load(wrong / file, load_external_data=False).graph.node) / 2
    assert tool(tmp_path / "d", "run") == 1


def test_a_layer_of_a_tensorrt_network(bundle, tmp_path, monkeypatch):
    """TensorRT-RTX builds an engine with all tensors as outputs; where it cannot run, ONNX Runtime computes them."""
    trt = pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx: pip install -e '.[tensorrt-rtx]'")
    file, name = first_of(bundle, "Attention")
    record = open_bundle(bundle).record
    rng = np.random.default_rng(0)
    inputs = {each.name: rng.normal(size=each.shape).astype(np.float32) for each in record.tensors[file][0]}
    miscompile(monkeypatch, file, name, swapped_input)
    monkeypatch.setattr(layers, "runner_for", lambda bundle, backend: runner.OnnxRuntimeRunner(bundle))
    path = save_alone(bundle / file, tmp_path)
    found = layers.compare_layers(open_bundle(bundle), path, inputs, "tensorrt", TOLERANCE)
    assert found.first.node == name
    (engine,) = (tmp_path / "engines").glob("*.engine")
    assert engine.stat().st_size > 10_000
    parser = trt.OnnxParser(network := trt.Builder(log := trt.Logger()).create_network(0), log)
    assert parser.parse_from_file(str(tmp_path / "layers.onnx"))
    parts = {network.get_layer(index).name for index in range(network.num_layers)}
    outputs = {network.get_output(index).name for index in range(network.num_outputs)}
    assert outputs == {row.tensor for row in found.rows}
    assert any(part.startswith(name) for part in parts)


def test_a_sound_program_has_no_first(bundle, tmp_path):
    done = dipgo("verify", bundle, "--number", 1, "--debug", tmp_path / "d")
    rows = table(tmp_path / "d" / "launches.csv")
    assert done.code == 0
    assert f"none of {len(rows)} launches diverges" in done.out
    record = open_bundle(bundle).record
    assert {row["graph"] for row in rows} == {*record.tensors}
    assert max(float(row["to torch"] or 0) for row in rows) < TOLERANCE
    assert dipgo("verify", bundle, "--debug", tmp_path / "d").err.endswith(
        f"{tmp_path / 'd'} exists; give another path\n"
    )


def test_without_polygraphy(bundle, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "polygraphy", None)
    for command in (
        ["verify", bundle, "--debug", tmp_path / "d"],
        ["inspect", bundle, "--visual", tmp_path / "p.html"],
    ):
        done = dipgo(*command)
        assert (done.code, done.err) == (1, "dipgo: polygraphy is not installed; run: pip install 'dipgo[debug]'\n")
    assert not list(tmp_path.iterdir())


def test_a_graph_as_a_page(bundle, tmp_path):
    done = dipgo("inspect", bundle, "--visual", tmp_path / "p.html")
    file = done.out.splitlines()[-1].split(", of ")[1].split(";")[0]
    nodes = onnx.load(bundle / file, load_external_data=False).graph.node
    assert nodes[-1].name in (tmp_path / "p.html").read_text()
    with refused("unknown graph 'none'", UsageError):
        from benchmarks.debug.visual import draw

        draw(bundle, tmp_path / "q.html", "none")


def test_differences_are_relative_and_finite():
    one = {"x": np.array([3, 4], np.float32), "y": np.array([np.inf], np.float32), "z": np.zeros(1, np.float32)}
    other = {"x": np.array([3, 4.1], np.float32), "y": one["y"], "z": one["z"]}
    differences = compare(one, other, 0.03)
    assert differences["x"].error == pytest.approx(0.02, rel=1e-5)
    assert [differences[name].holds for name in "xyz"] == [True, False, True]
    assert not compare(one, other, 0.01)["x"].holds
    assert not differences["y"].finite


@pytest.mark.slow
def test_polygraphy_shrinks_the_reproducer_to_the_node(bundle, tmp_path, monkeypatch):
    file, name = first_of(bundle, "LayerNormalization")
    miscompile(monkeypatch, file, name, wrong_constant)
    debug(bundle, tmp_path / "d", TOLERANCE, None, "onnxruntime")
    assert tool(tmp_path / "d", "debug reduce") == 0
    reduced = onnx.load(tmp_path / "d" / "reduced.onnx", load_external_data=False)
    assert [node.name for node in reduced.graph.node] == [name]


@pytest.mark.slow
def test_an_overflow_in_half_precision(tmp_path):
    """digits-dit, wrong in the graph itself: ONNX Runtime overflows in the same node with and without optimisations."""
    sound = shipped("digits-dit", torch.float16)
    file, name = first_of(sound, "LayerNormalization")
    export_wrongly(wrong := shutil.copytree(sound, tmp_path / "b"), file, name, overflow)
    done = dipgo("verify", wrong, "--debug", tmp_path / "d")
    assert done.code == 1
    assert f"first in node '{name}'" in done.err
    rows = table(tmp_path / "d" / "layers.csv")
    assert next(row["node"] for row in rows if row["finite"] == "False") == name


@pytest.mark.slow
@pytest.mark.parametrize("fault", [wrong_constant, swapped_input])
def test_emoji_sd(tmp_path, monkeypatch, fault):
    operator = "Attention" if fault is swapped_input else "GroupNormalization"
    file, name = first_of(shipped("emoji-sd"), operator)
    miscompile(monkeypatch, file, name, fault)
    assert f"'{name}'" in debug(shipped("emoji-sd"), tmp_path / "d", TOLERANCE, None, "onnxruntime")
