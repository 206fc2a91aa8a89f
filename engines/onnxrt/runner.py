"""Run a bundle's graphs with ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import numpy as np

from engines.onnxrt.loader import session_from_graph
from export.bundle import Bundle

Launch = Callable[[], None]

# In small graphs waking a second thread costs more than it brings: digits-dit (64 M MACs a row) takes 1.9 ms a step on
# one thread and 2.1 to 3.3 ms on two.
ONE_THREAD_MACS = 200_000_000


class OnnxRuntimeRunner:
    """Sessions of all graphs of a bundle, opened on entering the context and dropped on leaving it.

    ``threads`` None takes one thread for graphs under :data:`ONE_THREAD_MACS`, else lets ONNX Runtime choose.
    """

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        self.bundle = bundle
        largest = max(graph.macs for graph in bundle.record.graphs.values())
        self.threads = threads or (1 if largest < ONE_THREAD_MACS else None)
        self._sessions: dict[str, Any] = {}

    def __enter__(self) -> OnnxRuntimeRunner:
        record = self.bundle.record
        files = [graph.file for graph in record.graphs.values()]
        files += [prologue.file for prologue in record.prologues] + [record.decoder.file]
        self._sessions = {file: session_from_graph(self.bundle.folder / file, self.threads) for file in files}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._sessions = {}

    def bind(self, file: str, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> Launch:
        """Return a function that runs a graph from and into these arrays, in place and without copies.

        The arrays are contiguous and must outlive the function, which keeps them alive.
        """
        session = self._sessions[file]
        binding = session.io_binding()
        for name, array in inputs.items():
            binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for name, array in outputs.items():
            binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        held = (dict(inputs), dict(outputs))

        def launch(_held: Any = held) -> None:
            session.run_with_iobinding(binding)

        return launch

    def decode(self, latent: np.ndarray) -> np.ndarray:
        """Run the VAE decoder: latent ``[B, C, H, W]`` to pixels ``[B, channels, height, width]`` in [0, 1]."""
        record = self.bundle.record.decoder
        return self._sessions[record.file].run([record.output.name], {record.input.name: latent})[0]
