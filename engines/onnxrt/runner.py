"""Run a bundle's graphs with ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

import numpy as np

from engines.onnxrt.loader import session_from_graph
from export.bundle import Bundle


class OnnxRuntimeRunner:
    """Sessions of all graphs of a bundle, opened on entering the context and dropped on leaving it.

    ``launches`` counts the graph launches since the context was entered.
    """

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        self.bundle = bundle
        self.threads = threads
        self.launches = 0
        self._sessions: dict[str, Any] = {}

    def __enter__(self) -> OnnxRuntimeRunner:
        files = {name: graph.file for name, graph in self.bundle.record.graphs.items()}
        files["decoder"] = self.bundle.record.decoder.file
        self._sessions = {name: session_from_graph(self.bundle.folder / f, self.threads) for name, f in files.items()}
        self.launches = 0
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._sessions = {}

    def launch(self, graph: str, feeds: Mapping[str, Any], outputs: Iterable[str]) -> list[np.ndarray]:
        """Run one graph; returns the named outputs in order."""
        self.launches += 1
        return self._sessions[graph].run(list(outputs), dict(feeds))

    def decode(self, latent: np.ndarray) -> np.ndarray:
        """Run the VAE decoder: latent ``[B, C, H, W]`` to pixels ``[B, channels, height, width]`` in [0, 1]."""
        record = self.bundle.record.decoder
        return self._sessions["decoder"].run([record.output.name], {record.input.name: latent})[0]
