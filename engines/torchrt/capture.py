"""Launches of torch as one CUDA graph."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

from engines.backend import Launch
from engines.cuda.buffers import replay_of

_CAPTURING = threading.Lock()


class Capture:
    """Captures of one device: they share a stream, and the memory of what launches compute on the way.

    The memory may be shared because every graph is replayed on the device's one stream of work, and leaves its
    results in buffers that were there before it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def replay_of(self, launches: Sequence[Launch]) -> Launch | None:
        """Return one launch that replays all of these; None, with a warning, where they cannot be captured."""
        with _CAPTURING, torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):  # torch.cuda.graph does not leave it on failing
                replay = replay_of(launches, self._capture)
            torch.cuda.current_stream().wait_stream(self._stream)
        return replay

    def _capture(self, work: Launch) -> Launch:
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on launching: their calls are none of this capture's.
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            work()

        def replay(_work: Launch = work) -> None:  # it holds the buffers
            graph.replay()

        return replay
