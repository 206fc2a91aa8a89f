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

from dipgo.base.errors import DipgoError
from engines.cuda.runtime import find_device
from engines.trt import loader
from engines.trt.build import build
from engines.trt.library import find_library
from engines.trt.loader import BuildOptions, Graph, plan_from_graph
from engines.trt.processes import each
from engines.trt.store import graphs_of
from export.bundle import AxisRecord, TensorRecord, open_bundle
from export.compiler import write_bundle
from tests import zoo
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
        {value.name: (ONNX_NAMES[value.type.tensor_type.elem_type], sizes(value)) for value in values}
        for values in (graph.input, graph.output)
    ]


def sizes(value):
    return [size.dim_value for size in value.type.tensor_type.shape.dim]


def network_of(path):
    """Return the inputs and outputs of TensorRT's own network of a graph."""
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    assert trt.OnnxParser(network, logger).parse_from_file(str(path))
    names = {trt.DataType.FLOAT: "float32", trt.DataType.HALF: "float16", trt.DataType.INT64: "int64"}
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    return [{value.name: (names[value.dtype], list(value.shape)) for value in part} for part in (inputs, outputs)]


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
        assert found == interface(path) == network_of(path) == [recorded(graph.inputs), recorded(graph.outputs)]
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


def test_a_damaged_bundle_is_not_built_from(bundle):
    weights = next((bundle.folder / "transformer").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(DipgoError, match=r"altered since the bundle was made .* export it again"):
        build(open_bundle(bundle.folder, check_files=False), force=True)


def test_a_folder_that_cannot_be_written_is_said(bundle):
    shutil.rmtree(bundle.folder / "engines")
    (bundle.folder / "engines").write_text("in the way")
    with pytest.raises(DipgoError, match=r"engines: cannot be written \(.*\); build in a copy of the bundle"):
        build(bundle)


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
            with pytest.raises(DipgoError, match=r"builds no engine of it .* not supported by a dedicated kernel"):
                plan_from_graph(library, path, graph, {})
        assert plan_from_graph(library, path, graph, {}).data.nbytes > 50_000


def test_a_range_of_sizes_becomes_a_profile(tmp_path):
    """A graph of rows by columns, both symbolic; TensorRT builds none without a profile, and none backwards."""
    path = tmp_path / "g.onnx"
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["2*batch", 4, "width"]) for name in ("x", "y", "z")
    ]
    node = helper.make_node("Add", ["x", "y"], ["z"])
    opsets = [helper.make_opsetid("", 23)]
    onnx.save(helper.make_model(helper.make_graph([node], "g", values[:2], values[2:]), opset_imports=opsets), path)
    tensors = [TensorRecord(name=name, dtype="float32", shape=["2*batch", 4, "width"]) for name in ("x", "y", "z")]
    graph = Graph(file="g.onnx", inputs=tensors[:2], outputs=tensors[2:])
    axes = {"batch": AxisRecord(min=1, opt=2, max=4), "width": AxisRecord(min=8, opt=16, max=64)}
    assert plan_from_graph(find_library(None), path, graph, axes).data.nbytes > 0
    static = Graph(file="g.onnx", inputs=tensors[:2], outputs=[tensors[2].model_copy(update={"shape": [2, 4, 8]})])
    with pytest.raises(DipgoError, match=r"outputs differ from the bundle's record: z is .*-1, 4, -1.*export it again"):
        plan_from_graph(find_library(None), path, static, axes)


def test_stripping_needs_a_gpu(bundle):
    with pytest.raises(DipgoError, match=r"tensorrt-rtx makes engines without weights only where there is a GPU"):
        build(bundle, options=BuildOptions(strip=True))


def test_a_graph_that_tensorrt_does_not_take(tmp_path):
    path = tmp_path / "g.onnx"
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 8]) for name in ("x", "y")]
    nodes = [
        helper.make_node("SplitToSequence", ["x"], ["parts"], axis=1),
        helper.make_node("ConcatFromSequence", ["parts"], ["y"], axis=1),
    ]
    opsets = [helper.make_opsetid("", 23)]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", values[:1], values[1:]), opset_imports=opsets), path)
    tensors = [TensorRecord(name=name, dtype="float32", shape=[2, 8]) for name in ("x", "y")]
    with pytest.raises(DipgoError, match=r"g\.onnx: tensorrt-rtx .* does not take it \(SplitToSequence: .*export it"):
        plan_from_graph(find_library(None), path, Graph(file="g.onnx", inputs=tensors[:1], outputs=tensors[1:]), {})


@pytest.mark.parametrize(
    ("task", "ending"),
    [
        (("signal", "raise_signal", signal.SIGKILL), "the process at it was killed, most likely for want of memory; "),
        (("signal", "raise_signal", signal.SIGSEGV), "its process was killed by SIGSEGV$"),
        (("os", "_exit", 3), "its process ended with exit code 3$"),
        (("sys", "exit", "some words"), "its process ended with exit code 1; the last it said: some words$"),
    ],
)
def test_a_process_that_dies_is_said_in_one_line(task, ending):
    with pytest.raises(DipgoError, match=f"^graph: {ending}"):
        list(each("tests.engines.child", [("graph", task)], 1))


@pytest.mark.parametrize("task", ["small", "x" * 10**7], ids=["answer", "task"])
def test_a_process_that_dies_before_it_reads_its_task(task):
    """It is found out when its answer is due, or when a large task is handed over."""
    with pytest.raises(DipgoError, match=r"^graph: its process ended with exit code 3$"):
        list(each("tests.engines.stillborn", [("graph", task)], 1))


def test_results_come_from_several_processes():
    tasks = [(str(number), ("math", "sqrt", number)) for number in (1, 4, 9, 16, 25)]
    assert sorted(each("tests.engines.child", tasks, 2)) == [1, 2, 3, 4, 5]


def test_an_unknown_backend_builds_nothing(bundle):
    result = dipgo("build", bundle.folder, "--backend", "onnxruntime")
    assert result.code == 2
    assert result.err.endswith("dipgo: backend 'onnxruntime' builds nothing; use tensorrt or torch-aot\n")
