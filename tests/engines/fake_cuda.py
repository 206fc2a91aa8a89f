"""CUDA's runtime on the CPU, as far as ``engines.cuda.runtime`` calls it: host memory, a stream that runs at once.

While a stream is captured its work is kept instead of run, as CUDA does; a graph runs it. Whether the names exist in
the real bindings is tested in ``test_trt_cuda.py``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

OK, FULL, UNSUPPORTED = 0, 2, 900

Work = Callable[[], None]


class FakeCuda:
    """The module ``cuda.bindings.runtime``.

    Attributes:
        live: the allocations by address.
        capacity: bytes of the device's memory.
        can_capture: whether work on a captured stream is taken.
        count, current: how many GPUs there are, and the one that is current; the real one is a thread's own.
        launched: what ran, by name, in order.
    """

    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeRelaxed=2)

    def __init__(self, capability: tuple[int, int] = (9, 0), capacity: int = 10**9, count: int = 1) -> None:
        self.count, self.current = count, 0
        self.places: dict[int, int] = {}  # the GPU of each allocation
        self.capability, self.capacity, self.can_capture = capability, capacity, True
        self.live: dict[int, Any] = {}
        self.launched: list[str] = []
        self._captured: list[Work] | None = None
        self._broken = False

    def device_of(self, pointer: int) -> int:
        """Return the GPU that holds an address."""
        return next(self.places[first] for first, memory in self.live.items() if 0 <= pointer - first < len(memory))

    def put(self, name: str, work: Work) -> int:
        """Run work, or keep it where the stream is being captured."""
        if self._captured is None:
            self.launched.append(name)
            work()
            return OK
        if not self.can_capture:
            self._broken = True
            return UNSUPPORTED
        self._captured.append(work)
        return OK

    def cudaGetErrorString(self, status: int) -> tuple[int, bytes]:
        return OK, {FULL: b"out of memory", UNSUPPORTED: b"operation not permitted when stream is capturing"}[status]

    def cudaGetDeviceCount(self) -> tuple[int, int]:
        return OK, self.count

    def cudaGetDevice(self) -> tuple[int, int]:
        return OK, self.current

    def cudaSetDevice(self, device: int) -> tuple[int]:
        assert 0 <= device < self.count
        self.current = device
        return (OK,)

    def cudaGetDeviceProperties(self, device: int) -> tuple[int, Any]:
        major, minor = self.capability
        return OK, SimpleNamespace(name=b"Fake GPU", major=major, minor=minor, totalGlobalMem=self.capacity)

    def cudaMalloc(self, size: int) -> tuple[int, int | None]:
        if sum(map(len, self.live.values())) + size > self.capacity:
            return FULL, None
        memory = (ctypes.c_char * size)()
        ctypes.memset(memory, 0xAB, size)
        self.live[ctypes.addressof(memory)] = memory
        self.places[ctypes.addressof(memory)] = self.current
        return OK, ctypes.addressof(memory)

    def cudaFree(self, pointer: int) -> tuple[int]:
        del self.live[pointer]
        return (OK,)

    def cudaMemGetInfo(self) -> tuple[int, int, int]:
        return OK, self.capacity - sum(map(len, self.live.values())), self.capacity

    def cudaMemsetAsync(self, pointer: int, value: int, size: int, stream: int) -> tuple[int]:
        return (self.put("memset", lambda: ctypes.memset(pointer, value, size) and None),)

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: int, stream: int) -> tuple[int]:
        return (self.put(f"memcpy {kind}", lambda: ctypes.memmove(target, source, size) and None),)

    def cudaStreamCreate(self) -> tuple[int, int]:
        return OK, 7

    def cudaStreamDestroy(self, stream: int) -> tuple[int]:
        return (OK,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:
        return (OK if self._captured is None else UNSUPPORTED,)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[int]:
        assert self._captured is None
        self._captured, self._broken = [], False
        return (OK,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[int, Any]:
        graph, self._captured = self._captured, None
        return (UNSUPPORTED, None) if self._broken else (OK, graph)

    def cudaGraphInstantiate(self, graph: list[Work], flags: int) -> tuple[int, list[Work]]:
        return OK, list(graph)

    def cudaGraphDestroy(self, graph: list[Work]) -> tuple[int]:
        return (OK,)

    def cudaGraphExecDestroy(self, executable: list[Work]) -> tuple[int]:
        return (OK,)

    def cudaGraphLaunch(self, executable: list[Work], stream: int) -> tuple[int]:
        def work() -> None:
            for part in executable:
                part()

        return (self.put("graph", work),)
