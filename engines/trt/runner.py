"""Run a bundle's engines on a GPU: one stream, one arena of activations, the whole trajectory as one CUDA graph."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from dipgo.base.errors import DipgoError
from engines.backend import Launch
from engines.cuda.runtime import CudaError, DeviceArray, Stream, open_device
from engines.trt.library import Library, find_library, listener
from engines.trt.loader import BuildOptions, engine_from_plan, refit, tensors_of
from engines.trt.store import engine_path, find_engine, graphs_of, key_of
from export.bundle import Bundle


class TensorRtRunner:
    """The engines of a bundle, loaded on entering the context (those beside the loop when they are first needed).

    All launches go onto one stream, and a lock keeps what belongs to a launch together, so that threads may share the
    runner: their trajectories take turns. As no two launches run at once, all contexts use the same memory for their
    activations, as much as the largest asks for.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.label = "TensorRT"
        self._graphs = {graph.file: graph for graph in graphs_of(bundle.record)}
        self._engines: dict[str, _Engine] = {}
        self._arenas: list[DeviceArray] = []
        self._runtime: Any = None
        self._stream: Stream | None = None

    def __enter__(self) -> TensorRtRunner:
        try:
            device = open_device()
        except DipgoError as error:
            raise DipgoError(
                f"{self.bundle.folder}: TensorRT engines are built here, not run: {error}; or use --backend onnxruntime"
            ) from error
        self._library = find_library(device)
        self._target = self._library.target(device)
        self.label = f"{self._library.name} {self._library.version}, {device.name}"
        self._logger, self._errors = listener(self._library)
        self._runtime = self._library.module.Runtime(self._logger)
        self._stream = Stream()
        for file in self.bundle.record.loaded:
            self._engine(file)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stream:
            self._stream.wait()  # engines at work may not go
        self._engines, self._arenas, self._runtime = {}, [], None
        if self._stream:  # none where entering failed, or never happened
            self._stream.close()
        self._stream = None

    @property
    def stream(self) -> Stream:
        if self._stream is None:
            raise DipgoError(f"{self.bundle.folder}: the program is closed; enter it before use")
        return self._stream

    def zeros(self, shape: Sequence[int], dtype: str) -> DeviceArray:
        return self.stream.zeros(shape, dtype)

    def write(self, target: DeviceArray, values: np.ndarray) -> None:
        self.stream.write(target, values)

    def copy(self, target: DeviceArray, source: DeviceArray) -> None:
        self.stream.copy(target, source)

    def read(self, source: DeviceArray) -> np.ndarray:
        return self.stream.read(source)

    def bind(self, file: str, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]) -> Launch:
        """Return a function that runs a graph's engine from and into these arrays.

        Outputs that are not given are written where nobody reads them.

        Raises:
            DipgoError: an input is missing, or an array of another type than the engine's.
        """
        engine = self._engine(file)
        arrays = {**inputs, **outputs}
        with self.stream.lock:
            shapes = engine.shapes_for({name: array.shape for name, array in inputs.items()})
        for name, dtype in engine.tensors.items():
            if name not in arrays and name in engine.outputs:
                arrays[name] = self.stream.zeros(shapes[name], dtype)
            if name not in arrays or arrays[name].dtype != dtype or arrays[name].shape != shapes[name]:
                given = f"{arrays[name].dtype} {list(arrays[name].shape)}" if name in arrays else "nothing"
                raise DipgoError(f"{file}: '{name}' is {dtype} {list(shapes[name])} in its engine, got {given}")

        def launch() -> None:
            with self.stream.lock:
                engine.launch(arrays, self._arenas[-1], self.stream)

        return launch

    def run(self, file: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run a graph's engine once on values of the host; it is loaded when it is first needed."""
        engine = self._engine(file)
        given = {name: self.stream.zeros(values.shape, engine.tensors[name]) for name, values in inputs.items()}
        with self.stream.lock:
            shapes = engine.shapes_for({name: array.shape for name, array in given.items()})
        made = {name: self.stream.zeros(shapes[name], engine.tensors[name]) for name in engine.outputs}
        for name, values in inputs.items():
            self.stream.write(given[name], values)
        self.bind(file, given, made)()
        return {name: self.stream.read(array) for name, array in made.items()}

    def joined(self, launches: Sequence[Launch]) -> Launch | None:
        """Capture launches as one CUDA graph; None, with a warning, where something in them cannot be captured.

        They run once before: TensorRT sets up what it needs in a context's first launch.
        """

        def all_of_them() -> None:
            for launch in launches:
                launch()

        try:
            with self.stream.lock:
                all_of_them()
                return self.stream.capture(all_of_them)
        except CudaError as error:
            warnings.warn(f"{self.label}: no CUDA graph, steps are launched one by one ({error})", stacklevel=2)
            return None

    def _engine(self, file: str) -> _Engine:
        with self.stream.lock:
            if file not in self._engines:
                engine = self._load(file)
                if not self._arenas or self._arenas[-1].bytes < engine.activations:
                    # captured graphs go on with the arena that they know, so none is dropped
                    self._arenas.append(self.stream.zeros([engine.activations], "uint8"))
                self._engines[file] = engine
            return self._engines[file]

    def _load(self, file: str) -> _Engine:
        graph, bundle, library = self._graphs[file], self.bundle, self._library
        path = engine_path(bundle, graph, library, self._target)
        for options in (BuildOptions(), BuildOptions(strip=True)):
            if find_engine(path, key_of(bundle, graph, library, self._target, options), check=True):
                break
        else:
            raise DipgoError(
                f"{path}: no whole engine of this graph for {library.name} {library.version} on this GPU; "
                f"run: dipgo build {bundle.folder} --backend tensorrt"
            )
        engine = engine_from_plan(library, self._runtime, self._errors, path)
        if options.strip:
            refit(library, engine, bundle.folder / file)
        return _Engine(library, engine, path, self._errors)


class _Engine:
    """An engine and its one context. Not for several threads at once.

    Attributes:
        tensors: dtypes of inputs and outputs by name.
        outputs: the names of the outputs.
        activations: bytes that the context needs while it runs.
    """

    def __init__(self, library: Library, engine: Any, path: Path, errors: list[str]) -> None:
        trt = library.module
        self._errors, self._path = errors, path
        self._engine = engine
        self.tensors = tensors_of(library, engine)
        self.outputs = [name for name in self.tensors if engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT]
        self.activations = max(int(engine.device_memory_size_v2), 1)
        self._context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if self._context is None:
            raise DipgoError(f"{path}: no execution context; {self._last()}")
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._arena: DeviceArray | None = None

    def shapes_for(self, inputs: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all tensors for these shapes of inputs.

        Raises:
            DipgoError: a shape that the engine was not built for.
        """
        for name, shape in inputs.items():
            # only where it changes: TensorRT prepares anew after it, which a CUDA graph must not catch
            if name in self.tensors and self._shapes.get(name) != shape:
                if not self._context.set_input_shape(name, shape):
                    raise DipgoError(f"{self._path}: not built for '{name}' of shape {list(shape)}; {self._last()}")
                self._shapes[name] = shape
        return {name: tuple(self._context.get_tensor_shape(name)) for name in self.tensors}

    def launch(self, arrays: Mapping[str, DeviceArray], arena: DeviceArray, stream: Stream) -> None:
        """Put one run on the stream; the arrays must stay until it has ended.

        Raises:
            CudaError: TensorRT did not take it.
        """
        context = self._context
        if self._arena is not arena:
            context.set_device_memory(arena.pointer, arena.bytes)
            self._arena = arena
        for name in self.tensors:
            shape = arrays[name].shape
            if name not in self.outputs and self._shapes.get(name) != shape:
                context.set_input_shape(name, shape)
                self._shapes[name] = shape
            context.set_tensor_address(name, arrays[name].pointer)
        if not context.execute_async_v3(stream.handle):
            raise CudaError(f"{self._path}: the launch failed; {self._last()}")

    def _last(self) -> str:
        return self._errors[-1][:300] if self._errors else "TensorRT gives no reason"


def on_gpu(bundle: Bundle, threads: int | None = None) -> TensorRtRunner:
    """Return the runner of backend ``tensorrt``; ``threads`` is for backends on the CPU."""
    return TensorRtRunner(bundle)
