"""What the runners for GPUs share: buffers on one stream, and a trajectory's launches as one CUDA graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np

from dipgo.base.errors import DipgoError, DipgoWarning
from engines.backend import Launch
from engines.cuda.runtime import CudaError
from engines.cuda.stream import DeviceArray, Stream
from export.bundle import Bundle


class StreamRunner:
    """A runner's buffers: memory, copies and launches of a bundle on one stream, which it has while it is entered.

    What threads put on the stream runs in the order in which it comes; what belongs together is put there under the
    stream's lock. A backend adds :meth:`~engines.backend.Runner.bind` and :meth:`~engines.backend.Runner.run`.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self._stream: Stream | None = None

    @property
    def stream(self) -> Stream:
        if self._stream is None:
            raise DipgoError(f"{self.bundle.folder}: the program is closed; enter it before use")
        return self._stream

    def close_stream(self) -> None:
        """Wait for what is on the stream, and end it; nothing where there is none."""
        if self._stream:
            self._stream.close()
        self._stream = None

    def zeros(self, shape: Sequence[int], dtype: str) -> DeviceArray:
        return self.stream.zeros(shape, dtype)

    def write(self, target: DeviceArray, values: np.ndarray) -> None:
        self.stream.write(target, values)

    def copy(self, target: DeviceArray, source: DeviceArray) -> None:
        self.stream.copy(target, source)

    def read(self, source: DeviceArray) -> np.ndarray:
        return self.stream.read(source)

    def capture(self, launches: Sequence[Launch]) -> Launch | None:
        """Return all launches as one CUDA graph; None, with a warning, where something in them cannot be captured."""
        with self.stream.lock:
            return replay_of(launches, self.stream.capture)


def replay_of(launches: Sequence[Launch], capture: Callable[[Launch], Launch]) -> Launch | None:
    """Return launches as one, by a function that captures one; None, with a warning, where that cannot be.

    They run once before: libraries take memory, and compilers compile, in the first launch.
    """
    if not launches:
        return None

    def launch_all() -> None:
        for launch in launches:
            launch()

    try:
        launch_all()
        return capture(launch_all)
    except (CudaError, RuntimeError) as error:  # torch and ONNX Runtime raise the second
        warn_of_no_graph(str(error))
        return None


def warn_of_no_graph(reason: str) -> None:
    """Warn that a trajectory is launched step by step, and say why."""
    detail = " ".join(reason.split())[:200]
    warnings.warn(f"no CUDA graph of the trajectory, it runs step by step: {detail}", DipgoWarning, stacklevel=3)
