"""Graphs to networks to plans, and plans to engines."""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dipgo.base.errors import DipgoError
from dipgo.base.records import Record
from engines.trt.library import Library, dtype_names, listener
from engines.trt.timing import add_timings, use_timings
from export.axes import profile_of
from export.records.graphs import AxisRecord, TensorRecord

LEVEL = 3  # of the builder's optimisation, 0 to 5


class BuildOptions(Record):
    """What changes an engine beside its graph.

    Attributes:
        strip: leave the weights out; they are read from the graph's weights file whenever the engine is loaded.
    """

    strip: bool = False


class Graph(Record):
    """A graph of a bundle: its file's name and what goes in and out."""

    file: str
    inputs: list[TensorRecord]
    outputs: list[TensorRecord]


@dataclass(frozen=True)
class Plan:
    """A serialized engine, as a buffer of the library's, and the layers of its network."""

    data: Any
    layers: int


def plan_from_graph(
    library: Library,
    path: Path,
    graph: Graph,
    axes: Mapping[str, AxisRecord],
    options: BuildOptions = BuildOptions(),
    timing: Path | None = None,
) -> Plan:
    """Build an engine.

    Args:
        path: the graph's file, its weights beside it as it says.
        graph: what the network's inputs and outputs must be.
        axes: the ranges of the symbolic dimensions in ``graph``; none where all are fixed.
        timing: a file of kernel timings, read and added to; None where it would serve nothing.

    Raises:
        DipgoError: TensorRT refuses the graph, or builds no engine of it.
    """
    trt = library.module
    logger, errors = listener(library)
    builder = trt.Builder(logger)
    network = _parse(library, builder, logger, path)
    _check(library, network, graph, path)
    _let_attention_decompose(library, network)
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # float32 in a bundle means float32
    config.builder_optimization_level = LEVEL
    if options.strip:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)
    dynamic = [tensor for tensor in graph.inputs if any(isinstance(size, str) for size in tensor.shape)]
    if dynamic:
        profile = builder.create_optimization_profile()
        for tensor in dynamic:
            least, usual, most = profile_of(tensor, axes)
            profile.set_shape(tensor.name, least, usual, most)
        config.add_optimization_profile(profile)
    if timing is not None:
        use_timings(config, timing, errors)
    data = builder.build_serialized_network(network, config)
    if data is None:
        raise DipgoError(
            f"{path}: {library.name} builds no engine of it ({_last(errors)}); export with another --dtype"
        )
    if timing is not None:
        add_timings(config, timing)
    return Plan(data, network.num_layers)


def engine_from_plan(library: Library, runtime: Any, errors: list[str], path: Path) -> Any:
    """Load an engine from its file, which is mapped, not read.

    Raises:
        DipgoError: TensorRT refuses it: another GPU, another version, too little memory.
    """
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as plan:
        engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise DipgoError(
            f"{path}: {library.name} {library.version} does not load it on this GPU ({_last(errors)}); "
            "run: dipgo build BUNDLE --backend tensorrt --force"
        )
    return engine


def refit(library: Library, engine: Any, graph: Path) -> None:
    """Fill a stripped engine with the weights that its graph's file points to.

    Raises:
        DipgoError: weights are missing or are others than those that it was built with.
    """
    trt = library.module
    logger, errors = listener(library)
    refitter = trt.Refitter(engine, logger)
    parser = trt.OnnxParserRefitter(refitter, logger)
    if not parser.refit_from_file(str(graph)) or not refitter.refit_cuda_engine():
        raise DipgoError(f"{graph}: its weights do not fit the engine ({_last(errors)}); build it again with --force")


def tensors_of(library: Library, engine: Any) -> dict[str, str]:
    """Return the dtypes of an engine's inputs and outputs by name."""
    names = dtype_names(library)
    tensors = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    return {name: names[engine.get_tensor_dtype(name)] for name in tensors}


def _parse(library: Library, builder: Any, logger: Any, path: Path) -> Any:
    trt = library.module
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if parser.parse_from_file(str(path)):
        return network
    error = parser.get_error(0) if parser.num_errors else None
    detail = f"{error.node_operator()}: {' '.join(error.desc().split())}"[:300] if error else "it gives no reason"
    raise DipgoError(f"{path}: {library.name} {library.version} does not take it ({detail}); export it again")


def _check(library: Library, network: Any, graph: Graph, path: Path) -> None:
    """Compare the network's inputs and outputs with those that the bundle records."""
    names = dtype_names(library)
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    for kind, tensors, records in (("inputs", inputs, graph.inputs), ("outputs", outputs, graph.outputs)):
        actual = {tensor.name: (names.get(tensor.dtype), tuple(tensor.shape)) for tensor in tensors}
        expected = {
            tensor.name: (tensor.dtype, tuple(-1 if isinstance(size, str) else size for size in tensor.shape))
            for tensor in records
        }
        if actual != expected:
            name = min(name for name in actual.keys() | expected.keys() if actual.get(name) != expected.get(name))
            raise DipgoError(
                f"{path}: {kind} differ from the bundle's record: {name} is {actual.get(name)}, recorded "
                f"{expected.get(name)}; export it again"
            )


def _let_attention_decompose(library: Library, network: Any) -> None:
    """Let TensorRT write out each attention that it has no fused kernel for; by default it refuses the graph.

    It concerns masks (PixArt, Sana, text encoders) in float32 and unusual widths of heads; where there is a fused
    kernel it is still taken. (Polygraphy's SetDecomposableAttentions does the same to the same layers, but for the one
    TensorRT that an environment variable names when Polygraphy is first imported.)
    """
    trt = library.module
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionBoundaryLayer  # TensorRT hands out the base class
            layer.attention.decomposable = True


def _last(errors: Sequence[str]) -> str:
    return errors[-1][:300] if errors else "it gives no reason"
