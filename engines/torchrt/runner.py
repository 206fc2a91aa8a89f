"""Run a bundle's graphs with torch, on the GPU where there is one; buffers are tensors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
import torch

from engines.backend import Launch
from engines.torchrt.aot import inputs_by_file, load
from engines.torchrt.capture import Capture
from engines.torchrt.lift import Lifted, lift
from engines.torchrt.weights import Weights
from export.axes import shape_at
from export.bundle import Bundle

Function = Callable[..., Sequence[torch.Tensor]]
"""What runs a graph: tensors in the order of its inputs to tensors in the order of its outputs."""

Make = Callable[[Bundle, str, Lifted], Function]
"""Makes a function from a bundle, the graph's file name and the lifted graph."""

KEPT_SIZES = 8  # of a graph, where sizes are chosen at run time


class TorchRunner:
    """All graphs of a bundle as torch functions, with each weight in memory once.

    On a GPU everything is enqueued on the device's default stream, so launches of all threads follow each other. While
    a runner of a float32 bundle is entered, convolutions and products are computed in full float32, not in TF32.
    ``threads`` is the process's number of threads for torch; None leaves it alone.
    """

    def __init__(self, bundle: Bundle, device: torch.device, way: str, make: Make, threads: int | None = None) -> None:
        self.bundle, self.device, self.threads = bundle, device, threads
        self._make = make
        if device.type == "cuda":
            where = torch.cuda.get_device_name(device)
        else:
            count = threads or torch.get_num_threads()
            where = f"CPU, {count} thread{'s' * (count > 1)}"
        self.label = f"torch {torch.__version__} {way}, {where}"
        self._weights = Weights(bundle.folder, device)
        self._graphs: dict[str, dict[Any, tuple[Lifted, Function]]] = {}  # by file and shapes, the last used at the end
        self._making = threading.Lock()
        self._capture: Capture | None = None
        self._precision: tuple[bool, bool] | None = None

    def __enter__(self) -> TorchRunner:
        if self.threads:
            torch.set_num_threads(self.threads)
        if self.device.type == "cuda":
            self._capture = Capture(self.device)
            if self.bundle.record.dtype == "float32":
                self._precision = _set_tf32(False, False)
        if not self.bundle.record.axes:  # else each choice of sizes has graphs of its own
            for file, inputs in inputs_by_file(self.bundle.record, beside=False).items():
                self._graph(file, {tensor.name: shape_at(tensor.shape, {}) for tensor in inputs})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._graphs, self._capture = {}, None
        self._weights = Weights(self.bundle.folder, self.device)
        if self._precision:
            _set_tf32(*self._precision)
            self._precision = None

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
        lifted, function = self._graph(file, {name: tuple(buffer.shape) for name, buffer in inputs.items()})
        arguments = [inputs[given.name] for given in lifted.inputs]
        targets = [(lifted.outputs.index(name), buffer) for name, buffer in outputs.items()]

        def launch() -> None:
            with torch.no_grad():
                results = function(*arguments)
                for position, target in targets:
                    target.copy_(results[position])

        return launch

    def run(self, file: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        lifted, function = self._graph(file, {name: tuple(values.shape) for name, values in inputs.items()})
        arguments = [_tensor(inputs[given.name]).to(self.device, given.dtype) for given in lifted.inputs]
        with torch.no_grad():
            results = function(*arguments)
        return {name: self.read(result) for name, result in zip(lifted.outputs, results, strict=True)}

    def joined(self, launches: Sequence[Launch]) -> Launch | None:
        return self._capture.joined(launches) if self._capture else None

    def _graph(self, file: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Lifted, Function]:
        """Return a graph for inputs of these shapes."""
        with self._making:
            known, key = self._graphs.setdefault(file, {}), tuple(sorted(shapes.items()))
            if key not in known:
                lifted = lift(self.bundle.folder / file, self._weights, shapes)
                known[key] = lifted, self._make(self.bundle, file, lifted)
            known[key] = known.pop(key)
            for oldest in list(known)[:-KEPT_SIZES]:  # lanes hold on to those that they launch
                del known[oldest]
            return known[key]


def eager(bundle: Bundle, threads: int | None = None) -> TorchRunner:
    """Return the runner of backend ``torch``."""
    return TorchRunner(bundle, default_device(), "eager", _eager, threads)


def eager_on_cpu(bundle: Bundle, threads: int | None = None) -> TorchRunner:
    """Return the runner of backend ``torch-cpu``."""
    return TorchRunner(bundle, torch.device("cpu"), "eager", _eager, threads)


def compiled(bundle: Bundle, threads: int | None = None) -> TorchRunner:
    """Return the runner of backend ``torch-compile``; graphs are compiled when they first run."""
    return TorchRunner(bundle, default_device(), "compiled", _compiled, threads)


def packaged(bundle: Bundle, threads: int | None = None) -> TorchRunner:
    """Return the runner of backend ``torch-aot``, for which ``dipgo build`` has made packages."""
    return TorchRunner(bundle, default_device(), "AOTInductor", load, threads)


def default_device() -> torch.device:
    """Return the current GPU, or the CPU where there is none."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _eager(bundle: Bundle, file: str, lifted: Lifted) -> Function:
    return lifted.module


def _compiled(bundle: Bundle, file: str, lifted: Lifted) -> Function:
    # No CUDA graphs of torch's own: the whole trajectory becomes one.
    mode = "max-autotune-no-cudagraphs" if lifted.device.type == "cuda" else "default"
    function: Function = torch.compile(lifted.module, mode=mode, fullgraph=True, dynamic=False)
    return function


def _set_tf32(products: bool, convolutions: bool) -> tuple[bool, bool]:
    """Allow or forbid TF32, and return what was so before."""
    before = (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = products, convolutions
    return before


def _tensor(values: np.ndarray) -> torch.Tensor:
    """Return a copy as a tensor on the host; torch takes no bfloat16 from numpy."""
    return torch.from_numpy(np.array(values, np.float32 if values.dtype.name == "bfloat16" else None, order="C"))
