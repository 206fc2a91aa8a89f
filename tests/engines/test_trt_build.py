"""Engines built for real by TensorRT-RTX, which needs no GPU for that: cache, damage, interruption, two at once."""

import shutil
import signal
import subprocess
import sys
import time

import onnx
import pytest
import torch
from onnx import TensorProto, helper

from engines.cuda.runtime import find_device
from engines.trt import loader
from engines.trt.build import build
from engines.trt.library import find_library
from engines.trt.loader import BuildOptions, Graph, plan_from_graph
from engines.trt.processes import each
from engines.trt.store import graphs_of
from export.bundle import open_bundle
from export.compiler import write_bundle
from export.records.graphs import AxisRecord, TensorRecord
from tests import zoo
from tests.checks import refused
from tests.command import dipgo
from tests.models import random_subnet

trt = pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx: pip install -e '.[tensorrt-rtx]'")
pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-bindings: pip install -e '.[tensorrt-rtx]'")
pytestmark = pytest.mark.skipif(find_device() is not None, reason="there is a GPU: engines would be built for it")

ONNX_NAMES = {TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16", TensorProto.INT64: "int64"}


def written(kind, folder, dtype=torch.float32):
    """Export a random SubNet of a model whole."""
    traced, sampler = zoo.trace(kind, dtype=dtype), zoo.sampler(kind, 2)
    subnet = random_subnet(traced, sampler, 0, 0.5, 2, 2)
    write_bundle(zoo.converted(traced), subnet, sampler, folder)
    return open_bundle(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    traced, sampler = zoo.trace("dit"), zoo.sampler("dit", 3)
    folder = tmp_path_factory.mktemp("trt") / "made"
    write_bundle(zoo.converted(traced), random_subnet(traced, sampler, seed=0), sampler, folder)
    build(open_bundle(folder), workers=2)
    return folder


@pytest.fixture
def bundle(made, tmp_path):
    """A bundle with its engines, to spoil."""
    return open_bundle(shutil.copytree(made, tmp_path / "b"))


def engines_in(bundle):
    return sorted((bundle.folder / "engines").glob("*.engine"))


def interface(path):
    """Return the inputs and outputs of a graph as its own file has them, read apart from the bundle's record."""
    graph = onnx.load(path, load_external_data=False).graph
    return [
        {
            value.name: (ONNX_NAMES[value.type.tensor_type.elem_type], shape_of(value.type.tensor_type.shape))
            for value in values
        }
        for values in (graph.input, graph.output)
    ]


def shape_of(shape):
    return [size.dim_value for size in shape.dim]


def recorded(tensors):
    return {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors}


def test_every_graph_has_an_engine_with_the_bundle_s_inputs_and_outputs(bundle):
    built = build(bundle)
    graphs = graphs_of(bundle.record)
    assert sorted(graph.file for graph in graphs) == sorted(path.name for path in bundle.folder.glob("*.onnx"))
    assert [engine.record.graph for engine in built.engines] == [graph.file for graph in graphs]
    for engine, graph in zip(built.engines, graphs, strict=True):
        path = bundle.folder / graph.file
        found = [recorded(engine.record.inputs), recorded(engine.record.outputs)]
        assert found == interface(path) == [recorded(graph.inputs), recorded(graph.outputs)]
        assert engine.path.name == f"{path.stem}.tensorrt-rtx-{trt.__version__}.sm80plus.fp32.engine"
        assert engine.path.stat().st_size == engine.record.bytes > 50_000


@pytest.mark.slow
def test_a_whole_text_to_image_bundle_in_half(tmp_path):
    bundle = written("sd", tmp_path / "b", torch.float16)
    built = build(bundle)
    files = [engine.record.graph for engine in built.engines]
    assert {"text_encoder.onnx", "vae_decoder.onnx"} < set(files)
    for engine in built.engines:
        path = bundle.folder / engine.record.graph
        assert [recorded(engine.record.inputs), recorded(engine.record.outputs)] == interface(path)
        assert engine.path.name.endswith(".fp16.engine")


def test_the_second_build_is_served_from_the_cache(bundle, monkeypatch):
    """A copy has other times than the record, so files are read; and nothing is written."""
    before = {path: path.stat().st_mtime_ns for path in engines_in(bundle)}
    assert not any(engine.is_new for engine in build(bundle).engines)
    assert {path: path.stat().st_mtime_ns for path in engines_in(bundle)} == before
    result = dipgo("build", bundle.folder, "--backend", "tensorrt")
    assert result.code == 0
    lines = result.out.splitlines()
    assert sum(line.endswith("there already") for line in lines) == len(before)
    assert lines[-1] == "built, not run: no GPU can be used here"


@pytest.mark.parametrize("part", ["engine", "record", "cut", "other graph", "other version"])
def test_what_is_damaged_or_of_another_build_is_built_again(bundle, part):
    path = next(path for path in engines_in(bundle) if "prompt" in path.name)
    record, good = path.with_name(f"{path.name}.json"), path.read_bytes()
    match part:
        case "engine":
            path.write_bytes(b"\0" * len(good))
        case "record":
            record.write_text(record.read_text()[:50])
        case "cut":
            path.write_bytes(good[:1000])
        case "other graph":
            record.write_text(record.read_text().replace('"key": "', '"key": "0'))
        case "other version":
            record.unlink()
            path.rename(path.with_name(path.name.replace(trt.__version__, "1.6.0")))
    spoiled = path.read_bytes() if path.exists() else None
    built = build(bundle)
    assert [engine.path for engine in built.engines if engine.is_new] == [path]
    assert path.stat().st_size == len(good)
    aside = path.with_name(f"{path.name}.damaged")
    assert (aside.read_bytes() == spoiled) if part in ("engine", "cut") else not aside.exists()
    assert not any(engine.is_new for engine in build(bundle).engines)


def test_what_cannot_be_built(bundle):
    with refused(r"tensorrt-rtx makes engines without weights only where there is a GPU"):
        build(bundle, options=BuildOptions(strip=True))
    result = dipgo("build", bundle.folder, "--backend", "onnxruntime")
    assert result.code == 2
    assert result.err.endswith("dipgo: backend 'onnxruntime' builds nothing; use tensorrt or torch-aot\n")
    shutil.rmtree(bundle.folder / "engines")
    (bundle.folder / "engines").write_text("in the way")
    with refused(r"engines: cannot be written \(.*\); build in a copy of the bundle"):
        build(bundle)
    weights = next((bundle.folder / "transformer").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with refused(r"altered since the bundle was made .* export it again"):
        build(open_bundle(bundle.folder, check_files=False), force=True)


@pytest.mark.slow
def test_two_processes_at_once_and_one_killed(bundle):
    """The first is killed after its first engine; what it made stays, and two that start then share the rest."""
    shutil.rmtree(bundle.folder / "engines")
    command = [sys.executable, "-m", "dipgo.cli.main", "build", str(bundle.folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not list((bundle.folder / "engines").glob("*.engine.json")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 1
    assert process.stderr.read().splitlines()[-1] == "dipgo: interrupted; what was not finished was not written"
    kept = {path: path.stat().st_mtime_ns for path in (bundle.folder / "engines").glob("*.engine.json")}
    total = len(graphs_of(bundle.record))
    assert 1 <= len(kept) < total
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    new = [output.count("built in") for output, _ in outputs]
    assert sorted(new) == [0, total - len(kept)]
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert len(engines_in(bundle)) == total
    assert not any(engine.is_new for engine in build(bundle).engines)
    assert not list((bundle.folder / "engines").glob(".*.engine"))


@pytest.mark.slow
def test_masked_attention_is_built(tmp_path, monkeypatch):
    """PixArt and its text encoder: TensorRT refuses their attention, unless it may be written out."""
    bundle = written("pixart", tmp_path / "b")
    library, masked = find_library(None), []
    for graph in graphs_of(bundle.record):
        nodes = onnx.load(bundle.folder / graph.file, load_external_data=False).graph.node
        if any(node.op_type == "Attention" and len(node.input) > 3 for node in nodes):
            masked.append(graph)
    assert len(masked) > 1
    for graph in (masked[0], masked[-1]):
        path = bundle.folder / graph.file
        with monkeypatch.context() as patch:
            patch.setattr(loader, "_let_attention_decompose", lambda library, network: None)
            with refused(r"builds no engine of it .* not supported by a dedicated kernel"):
                plan_from_graph(library, path, graph, {})
        assert plan_from_graph(library, path, graph, {}).data.nbytes > 50_000


def saved(path, shape, nodes):
    """Save a graph of float32 tensors of one shape, of nodes as operator, inputs, outputs, attributes; the last is out.

    Returns what a bundle would record of it.
    """
    names = [name for name in ("x", "y") if any(name in inputs for _, inputs, _, _ in nodes)] + [nodes[-1][2][0]]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in names]
    made = [helper.make_node(operator, inputs, outputs, **options) for operator, inputs, outputs, options in nodes]
    graph = helper.make_graph(made, "g", values[:-1], values[-1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]), path)
    tensors = [TensorRecord(name=name, dtype="float32", shape=shape) for name in names]
    return Graph(file=path.name, inputs=tensors[:-1], outputs=tensors[-1:])


def test_a_range_of_sizes_becomes_a_profile(tmp_path):
    """A graph of rows by columns, both symbolic; TensorRT builds none without a profile, and none backwards."""
    path = tmp_path / "g.onnx"
    graph = saved(path, ["2*batch", 4, "width"], [("Add", ["x", "y"], ["z"], {})])
    axes = {"batch": AxisRecord(min=1, opt=2, max=4), "width": AxisRecord(min=8, opt=16, max=64)}
    assert plan_from_graph(find_library(None), path, graph, axes).data.nbytes > 0
    static = graph.model_copy(update={"outputs": [graph.outputs[0].model_copy(update={"shape": [2, 4, 8]})]})
    with refused(r"outputs differ from the bundle's record: z is .*-1, 4, -1.*export it again"):
        plan_from_graph(find_library(None), path, static, axes)


def test_a_graph_that_tensorrt_does_not_take(tmp_path):
    split = ("SplitToSequence", ["x"], ["parts"], {"axis": 1})
    graph = saved(tmp_path / "g.onnx", [2, 8], [split, ("ConcatFromSequence", ["parts"], ["z"], {"axis": 1})])
    with refused(r"g\.onnx: tensorrt-rtx .* does not take it \(SplitToSequence: .*export it"):
        plan_from_graph(find_library(None), tmp_path / "g.onnx", graph, {})


@pytest.mark.parametrize(
    ("task", "ending", "module"),
    [
        (("signal", "raise_signal", signal.SIGKILL), "the process at it was killed, most likely for want of", "child"),
        (("signal", "raise_signal", signal.SIGSEGV), "its process was killed by SIGSEGV$", "child"),
        (("os", "_exit", 3), "its process ended with exit code 3$", "child"),
        (("sys", "exit", "words"), "its process ended with exit code 1; the last it said: words$", "child"),
        ("small", "its process ended with exit code 3$", "stillborn"),  # found out when its answer is due
        ("x" * 10**7, "its process ended with exit code 3$", "stillborn"),  # when a large task is handed over
    ],
    ids=["killed", "crashed", "ended", "exited", "stillborn", "stillborn, large"],
)
def test_a_process_that_dies_is_said_in_one_line(task, ending, module):
    with refused(f"^graph: {ending}"):
        list(each(f"tests.engines.{module}", [("graph", task)], 1))


def test_results_come_from_several_processes():
    tasks = [(str(number), ("math", "sqrt", number)) for number in (1, 4, 9, 16, 25)]
    assert sorted(each("tests.engines.child", tasks, 2)) == [1, 2, 3, 4, 5]
