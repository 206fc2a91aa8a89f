"""Run a bundle's graphs with ONNX Runtime on the CPU; buffers are numpy arrays."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from engines.backend import Launch
from engines.onnxrt.loader import refusal, session_from_graph
from export.bundle import Bundle

# In small graphs waking a second thread costs more than it brings: digits-dit (64 M MACs a row) takes 1.9 ms a step on
# one thread and 2.1 to 3.3 ms on two.
ONE_THREAD_MACS = 200_000_000

# From here on graphs share their weights in memory; below, each keeps a copy in the layout that is fastest for it.
SHARED_PARAMETERS = 100_000_000


class OnnxRuntimeRunner:
    """Sessions of all graphs of a bundle, opened on entering the context and dropped on leaving it.

    ``threads`` None takes one thread for graphs under :data:`ONE_THREAD_MACS`, else lets ONNX Runtime choose.
    """

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        self.bundle = bundle
        largest = max(graph.macs for graph in bundle.record.graphs.values())
        self.threads = threads or (1 if largest < ONE_THREAD_MACS else None)
        self._share_weights = max(part.parameters for part in self.bundle.record.parts) > SHARED_PARAMETERS
        self.label = f"ONNX Runtime CPU, its own choice of threads on {os.cpu_count()} cores"
        if self.threads:
            self.label = f"ONNX Runtime CPU, {self.threads} thread{'s' * (self.threads > 1)}"
        self._sessions: dict[str, Any] = {}

    def __enter__(self) -> OnnxRuntimeRunner:
        for file in self.bundle.record.loaded:
            self._session(file)
        return self

    def __exit__(self, *error: object) -> None:
        self._sessions = {}

    def zeros(self, shape: Sequence[int], dtype: str) -> np.ndarray:
        return np.zeros(shape, dtype)

    def write(self, target: np.ndarray, values: np.ndarray) -> None:
        target[...] = values

    def copy(self, target: np.ndarray, source: np.ndarray) -> None:
        target[...] = source

    def read(self, source: np.ndarray) -> np.ndarray:
        return source

    def capture(self, launches: Sequence[Launch]) -> None:
        return None

    def bind(self, file: str, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> Launch:
        """Return a function that runs a graph from and into these arrays, in place and without copies.

        The arrays are contiguous and must outlive the function, which keeps them alive.
        """
        session = self._session(file)
        binding = session.io_binding()
        for name, array in inputs.items():
            binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for name, array in outputs.items():
            binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        arrays = (dict(inputs), dict(outputs))

        def launch(_arrays: Any = arrays) -> None:
            try:
                session.run_with_iobinding(binding)
            except Exception as error:  # as where a class is beyond a table's end
                raise refusal(self.bundle.folder / file, error) from error

        return launch

    def run(self, file: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run a graph once on these inputs; its session is opened when it is first needed."""
        session = self._session(file)
        names = [output.name for output in session.get_outputs()]
        try:
            return dict(zip(names, session.run(names, dict(inputs)), strict=True))
        except Exception as error:
            raise refusal(self.bundle.folder / file, error) from error

    def _session(self, file: str) -> Any:
        if file not in self._sessions:
            self._sessions[file] = session_from_graph(self.bundle.folder / file, self.threads, self._share_weights)
        return self._sessions[file]
