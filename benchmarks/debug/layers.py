"""The first layer of a graph in which a backend leaves ONNX Runtime, whose optimisations are off."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from benchmarks.debug.differences import Difference, Values, compare, quiet
from benchmarks.debug.graphs import layers_of, producers, read_graph, session, with_outputs
from dipgo.base.files import sha256_of
from engines.backends import runner_for
from export.bundle import Bundle
from export.records.bundle import FileRecord
from export.records.graphs import GraphRecord, read_signature

if TYPE_CHECKING:
    from polygraphy.backend.base import BaseRunner

FILE = "layers.onnx"
_ALIKE = {"torch-aot": "torch-compile"}  # compiled by the same compiler, without a package


@dataclass(frozen=True)
class Layer:
    """One tensor that a node computes, and how it differs; None where there is nothing to compare it with."""

    node: str
    operator: str
    tensor: str
    difference: Difference | None


@dataclass(frozen=True)
class Layers:
    """A graph, layer by layer.

    Attributes:
        rows: in the order of the nodes.
        first: the layer in which error begins; None where no layer alone shows it.
        expected, actual: the values of all layers.
    """

    rows: list[Layer]
    first: Layer | None
    expected: Values
    actual: Values


def compare_layers(bundle: Bundle, path: Path, inputs: Values, backend: str, tolerance: float) -> Layers:
    """Run a graph of a bundle in both with all its tensors as outputs.

    Where that makes the error go, because what is an output is not fused with what follows, tensors are made outputs
    one at a time, by bisection.

    Args:
        path: the graph, in a folder of its own with its weights, into which graphs with more outputs are written.
        inputs: by name, as the launch had them.
        backend: runs it as ``bundle`` would be run.
    """
    from polygraphy.backend.onnxrt import OnnxrtRunner
    from polygraphy.comparator import Comparator

    model = read_graph(path, inputs)
    names, outputs = layers_of(model), [value.name for value in model.graph.output]

    def run(tensors: Sequence[str]) -> tuple[Values, Values]:
        marked = with_outputs(model, tensors)
        onnx.save(marked, path.with_name(FILE))
        runners = [OnnxrtRunner(session(marked, path.parent)), _runner(_only(bundle, path.with_name(FILE)), backend)]
        with quiet():
            (_, (expected,)), (_, (actual,)) = Comparator.run(runners, data_loader=[dict(inputs)])
        return dict(expected), dict(actual)

    expected, actual = run(names)
    differences = compare(expected, actual, tolerance)
    first = _begin(model, outputs, {name for name in names if not differences[name].holds})
    if first is None:
        first = _bisect(names, outputs, lambda tensors: _bad(*run(tensors), tolerance))
    nodes = producers(model)
    rows = [Layer(nodes[name].name, nodes[name].op_type, name, differences[name]) for name in names]
    return Layers(rows, next((row for row in rows if row.tensor == first), None), expected, actual)


def _begin(model: onnx.ModelProto, outputs: Sequence[str], bad: Collection[str]) -> str | None:
    """Return the first of the bad tensors from which error runs unbroken to an output of the graph.

    Others are of no account, such as differences of almost equal values, and masks of infinities.
    """
    nodes, reached = producers(model), set()
    waiting = [name for name in outputs if name in bad]
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += [source for source in nodes[name].input if source in bad]
    return next((name for name in nodes if name in reached), None)


def _bad(expected: Values, actual: Values, tolerance: float) -> set[str]:
    return {name for name, difference in compare(expected, actual, tolerance).items() if not difference.holds}


def _bisect(names: Sequence[str], outputs: Sequence[str], bad: Callable[[Sequence[str]], set[str]]) -> str | None:
    """Return the first tensor that is bad when it alone is an output beside the graph's own."""
    wrong = bad(outputs)
    if not wrong:
        return None
    low, high = 0, min(position for position, name in enumerate(names) if name in wrong)
    while low < high:
        middle = (low + high) // 2
        if names[middle] in bad([*outputs, names[middle]]):
            high = middle
        else:
            low = middle + 1
    return names[high]


def _only(bundle: Bundle, path: Path) -> Bundle:
    """Return a bundle of nothing but a graph, as runners take it."""
    signature = read_signature(path, "export it again")
    graph = GraphRecord(
        file=FILE, signature="", macs=0, parameters=0, inputs=signature.inputs, outputs=signature.outputs, rows={}
    )
    files = {FILE: FileRecord(bytes=path.stat().st_size, sha256=sha256_of(path))}
    changes: dict[str, Any] = {"graphs": {FILE: graph}, "prologues": [], "further": [], "decoder": None}
    changes |= {"axes": {}, "files": files}
    changes["conditioning"] = bundle.record.conditioning.model_copy(update={"encoder": None})
    return Bundle(path.parent, bundle.record.model_copy(update=changes), bundle.tables)


def _build(bundle: Bundle) -> None:
    """Build the engine of a bundle's only graph."""
    from engines.cuda.runtime import find_device
    from engines.trt.build import make_engine, task_for
    from engines.trt.library import find_library
    from engines.trt.loader import BuildOptions
    from engines.trt.store import graphs_of

    library = find_library(device := find_device())
    (graph,) = graphs_of(bundle.record)
    make_engine(task_for(bundle, graph, library, library.target(device), BuildOptions()))


def _runner(bundle: Bundle, backend: str) -> BaseRunner:
    """Return a backend of dipgo's as a runner of Polygraphy's."""
    from polygraphy.backend.base import BaseRunner
    from polygraphy.common import TensorMetadata

    class Backend(BaseRunner):
        def activate_impl(self) -> None:
            if backend == "tensorrt":
                _build(bundle)
            self.runner = runner_for(bundle, _ALIKE.get(backend, backend))
            self.runner.__enter__()

        def get_input_metadata_impl(self) -> Any:
            metadata = TensorMetadata()
            for tensor in bundle.record.graphs[FILE].inputs:
                metadata.add(tensor.name, np.dtype(tensor.dtype), tensor.shape)
            return metadata

        def infer_impl(self, feed_dict: Values) -> dict[str, np.ndarray]:
            self.inference_time = 0.0
            return self.runner.run(FILE, feed_dict)

        def deactivate_impl(self) -> None:
            self.runner.__exit__(None, None, None)

    return Backend(name=backend)
