"""Run a bundle's graphs with torch, on the GPU where there is one; buffers are tensors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch

from dipgo.base.errors import UsageError
from engines.backend import Launch
from engines.devices import check_index, place_of
from engines.torchrt.aot import inputs_by_file, load
from engines.torchrt.capture import Capture
from engines.torchrt.loader import TorchGraph, module_from_graph
from engines.torchrt.precision import full_float32
from engines.torchrt.weights import Weights
from export.axes import shape_at
from export.bundle import Bundle

Function = Callable[..., Sequence[torch.Tensor]]
"""What runs a graph: tensors in the order of its inputs to tensors in the order of its outputs."""

Make = Callable[[Bundle, str, TorchGraph], Function]
"""Makes a function from a bundle, the graph's file name and the graph."""

SIZES_AT_ONCE = 8  # of a graph, where sizes are chosen at run time


class TorchRunner:
    """All graphs of a bundle as torch functions, with each weight in memory once.

    On a GPU everything is enqueued on the device's default stream, so launches of all threads follow each other. While
    a runner of a float32 bundle is entered, convolutions and products are computed in full float32, not in TF32.
    ``threads`` is the process's number of threads for torch; None leaves it alone. ``way`` is ``eager``, ``compiled``
    when they first run, or ``AOTInductor``, by packages that ``dipgo build`` has made.
    """

    def __init__(
        self, bundle: Bundle, threads: int | None = None, way: str = "eager", device: str | None = None
    ) -> None:
        self.bundle, self.threads, self._make = bundle, threads, _WAYS[way]
        self.device = device_named(device) if device else default_device()
        if self.device.type == "cuda":
            where = torch.cuda.get_device_name(self.device)
        else:
            count = threads or torch.get_num_threads()
            where = f"CPU, {count} thread{'s' * (count > 1)}"
        self.label = f"torch {torch.__version__} {way}, {where}"
        self._weights = Weights(bundle.folder, self.device)
        # By file and shapes, the last used at the end.
        self._graphs: dict[str, dict[Any, tuple[TorchGraph, Function]]] = {}
        self._lock = threading.Lock()
        self._capture: Capture | None = None
        self._precision = ExitStack()

    def __enter__(self) -> TorchRunner:
        if self.threads:
            torch.set_num_threads(self.threads)
        if self.device.type == "cuda":
            self._capture = Capture(self.device)
            if self.bundle.record.dtype == "float32":
                self._precision.enter_context(full_float32())
        if not self.bundle.record.axes:  # else each choice of sizes has graphs of its own
            for file, inputs in inputs_by_file(self.bundle.record, beside=False).items():
                self._graph(file, {tensor.name: shape_at(tensor.shape, {}) for tensor in inputs})
        return self

    def __exit__(self, *error: object) -> None:
        self._graphs, self._capture = {}, None
        self._weights = Weights(self.bundle.folder, self.device)
        self._precision.close()

    def zeros(self, shape: Sequence[int], dtype: str) -> torch.Tensor:
        return torch.zeros(tuple(shape), dtype=getattr(torch, dtype), device=self.device)

    def write(self, target: torch.Tensor, values: np.ndarray) -> None:
        target.copy_(_tensor(values))

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source)

    def read(self, source: torch.Tensor) -> np.ndarray:
        """Return a buffer's values, on the CPU as a view; bfloat16 as float32, since numpy has no such type."""
        return (source.float() if source.dtype == torch.bfloat16 else source).cpu().numpy()

    def bind(self, file: str, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> Launch:
        graph, function = self._graph(file, {name: tuple(buffer.shape) for name, buffer in inputs.items()})
        arguments = [inputs[tensor.name] for tensor in graph.inputs]
        targets = [(graph.outputs.index(name), buffer) for name, buffer in outputs.items()]

        def launch() -> None:
            with torch.no_grad():
                results = function(*arguments)
                for position, target in targets:
                    target.copy_(results[position])

        return launch

    def run(self, file: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        graph, function = self._graph(file, {name: tuple(values.shape) for name, values in inputs.items()})
        arguments = [_tensor(inputs[tensor.name]).to(self.device, tensor.dtype) for tensor in graph.inputs]
        with torch.no_grad():
            results = function(*arguments)
        return {name: self.read(result) for name, result in zip(graph.outputs, results, strict=True)}

    def capture(self, launches: Sequence[Launch]) -> Launch | None:
        return self._capture.replay_of(launches) if self._capture else None

    def _graph(self, file: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[TorchGraph, Function]:
        """Return a graph for inputs of these shapes."""
        with self._lock:
            graphs, key = self._graphs.setdefault(file, {}), tuple(sorted(shapes.items()))
            if key not in graphs:
                graph = module_from_graph(self.bundle.folder / file, self._weights, shapes)
                graphs[key] = graph, self._make(self.bundle, file, graph)
            graphs[key] = graphs.pop(key)
            for oldest in list(graphs)[:-SIZES_AT_ONCE]:  # contexts hold on to those that they launch
                del graphs[oldest]
            return graphs[key]


def default_device() -> torch.device:
    """Return the current GPU, or the CPU where there is none."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def device_named(name: str) -> torch.device:
    """Return torch's device of a name such as ``cuda:1``; ``cuda`` is the current GPU.

    Raises:
        UsageError: no such device here.
    """
    place = place_of(name)
    if place.kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UsageError(f"device '{name}': torch sees no GPU here; give cpu, or run it where nvidia-smi lists one")
    check_index(place.index, torch.cuda.device_count())
    return torch.device("cuda", torch.cuda.current_device() if place.index is None else place.index)


def _eager(bundle: Bundle, file: str, graph: TorchGraph) -> Function:
    return graph.module


def _compile(bundle: Bundle, file: str, graph: TorchGraph) -> Function:
    # No CUDA graphs of torch's own: the whole trajectory becomes one.
    mode = "max-autotune-no-cudagraphs" if graph.device.type == "cuda" else "default"
    function: Function = torch.compile(graph.module, mode=mode, fullgraph=True, dynamic=False)
    return function


_WAYS: dict[str, Make] = {"eager": _eager, "compiled": _compile, "AOTInductor": load}


def _tensor(values: np.ndarray) -> torch.Tensor:
    """Return a copy as a tensor on the host; torch takes no bfloat16 from numpy."""
    return torch.from_numpy(np.array(values, np.float32 if values.dtype.name == "bfloat16" else None, order="C"))
