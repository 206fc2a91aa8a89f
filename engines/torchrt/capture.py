"""Launches as one CUDA graph."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence

import torch

from engines.backend import Launch

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

    def joined(self, launches: Sequence[Launch]) -> Launch | None:
        """Return one launch that replays all of these; None, with a warning, where they cannot be captured.

        The launches run once before the capture: libraries allocate their workspaces, and compilers compile, then.
        """
        if not launches:
            return None
        graph = torch.cuda.CUDAGraph()
        try:
            with _CAPTURING, torch.cuda.device(self._device):
                self._stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(self._stream):  # torch.cuda.graph does not leave it on failing
                    for launch in launches:
                        launch()
                    # Other threads may go on launching: their calls are none of this capture's.
                    with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                        for launch in launches:
                            launch()
                torch.cuda.current_stream().wait_stream(self._stream)
        except RuntimeError as error:
            detail = " ".join(str(error).split())[:200]
            warnings.warn(f"no CUDA graph of the trajectory, it runs step by step: {detail}", stacklevel=2)
            return None

        def replay(_held: Sequence[Launch] = tuple(launches)) -> None:  # the launches hold the buffers
            graph.replay()

        return replay
