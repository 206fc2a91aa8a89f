"""Run a bundle's engines on a GPU: one stream, one arena of activations, the whole trajectory as one CUDA graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dipgo.base.errors import DipgoError, UsageError
from engines.backend import Launch
from engines.cuda.buffers import StreamRunner
from engines.cuda.runtime import open_device
from engines.cuda.stream import DeviceArray, Stream
from engines.devices import place_of
from engines.trt.engine import LoadedEngine
from engines.trt.library import find_library, listener
from engines.trt.loader import BuildOptions, engine_from_plan, refit
from engines.trt.store import engine_path, find_engine, graphs_of, key_of
from export.bundle import Bundle


class TensorRtRunner(StreamRunner):
    """The engines of a bundle, loaded on entering the context (those beside the loop when they are first needed).

    All launches go onto one stream, and a lock keeps what belongs to a launch together, so that threads may share the
    runner: their trajectories take turns. As no two launches run at once, all contexts use the same memory for their
    activations, as much as the largest asks for.
    """

    def __init__(self, bundle: Bundle, threads: int | None = None, device: str = "cuda") -> None:
        super().__init__(bundle)
        self.label = "TensorRT"
        self._index = place_of(device).index
        self._graphs = {graph.file: graph for graph in graphs_of(bundle.record)}
        self._engines: dict[str, LoadedEngine] = {}
        self._arenas: list[DeviceArray] = []
        self._runtime: Any = None

    def __enter__(self) -> TensorRtRunner:
        try:
            device = open_device(self._index)
        except UsageError:
            raise
        except DipgoError as error:
            raise DipgoError(
                f"{self.bundle.folder}: TensorRT engines are built here, not run: {error}; or use --backend onnxruntime"
            ) from error
        self._library = find_library(device)
        self._target = self._library.target(device)
        self.label = f"{self._library.name} {self._library.version}, {device.name}"
        self._logger, self._errors = listener(self._library)
        self._stream = Stream(device.index)
        with self._stream.lock:
            self._runtime = self._library.module.Runtime(self._logger)
        for file in self.bundle.record.loaded:
            self._engine(file)
        return self

    def __exit__(self, *error: object) -> None:
        if self._stream:  # none where entering failed, or never happened
            self._stream.wait()  # engines at work may not go
        self._engines, self._arenas, self._runtime = {}, [], None
        self.close_stream()

    def bind(self, file: str, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]) -> Launch:
        """Return a function that runs a graph's engine from and into these arrays.

        Outputs without an array are written where nobody reads them.

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
                other = f"{arrays[name].dtype} {list(arrays[name].shape)}" if name in arrays else "nothing"
                raise DipgoError(f"{file}: '{name}' is {dtype} {list(shapes[name])} in its engine, got {other}")

        def launch() -> None:
            with self.stream.lock:
                engine.launch(arrays, self._arenas[-1], self.stream)

        return launch

    def run(self, file: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run a graph's engine once on values of the host; it is loaded when it is first needed."""
        engine = self._engine(file)
        arrays = {name: self.zeros(values.shape, engine.tensors[name]) for name, values in inputs.items()}
        with self.stream.lock:
            shapes = engine.shapes_for({name: array.shape for name, array in arrays.items()})
        outputs = {name: self.zeros(shapes[name], engine.tensors[name]) for name in engine.outputs}
        for name, values in inputs.items():
            self.write(arrays[name], values)
        self.bind(file, arrays, outputs)()
        return {name: self.read(array) for name, array in outputs.items()}

    def _engine(self, file: str) -> LoadedEngine:
        with self.stream.lock:
            if file not in self._engines:
                engine = self._load(file)
                if not self._arenas or self._arenas[-1].bytes < engine.activations:
                    # captured graphs go on with the arena that they know, so none is dropped
                    self._arenas.append(self.stream.zeros([engine.activations], "uint8"))
                self._engines[file] = engine
            return self._engines[file]

    def _load(self, file: str) -> LoadedEngine:
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
        return LoadedEngine(library, engine, path, self._errors)
