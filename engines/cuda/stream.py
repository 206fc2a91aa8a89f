"""Memory on a CUDA device, and one stream of work on it, without torch."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from math import prod

import numpy as np

from dipgo.base.dtypes import Dtype
from dipgo.base.errors import DipgoError
from engines.cuda.runtime import CudaError, bindings, call, call_quietly


class DeviceArray:
    """Contiguous memory on the device, or a view of one; it lives as long as a view of it does.

    Attributes:
        pointer: the device address.
        shape: a tuple of ints.
        dtype: numpy's name, or ``bfloat16``.
    """

    def __init__(self, memory: object, pointer: int, shape: Sequence[int], dtype: str) -> None:
        self._memory, self.pointer, self.shape, self.dtype = memory, pointer, tuple(shape), dtype

    @property
    def bytes(self) -> int:
        return prod(self.shape) * Dtype(self.dtype).itemsize

    def __getitem__(self, index: int, /) -> DeviceArray:
        """Return a view of one row; negative indices count from the end."""
        count = self.shape[0]
        if not -count <= index < count:
            raise IndexError(f"row {index} of {count}")
        row = self.shape[1:]
        offset = index % count * prod(row) * Dtype(self.dtype).itemsize
        return DeviceArray(self._memory, self.pointer + offset, row, self.dtype)

    def reshape(self, *shape: int) -> DeviceArray:
        """Return a view in another shape of the same size; one entry may be -1."""
        shape = np.empty(self.shape, np.void).reshape(shape).shape  # elements of no size
        return DeviceArray(self._memory, self.pointer, shape, self.dtype)


class Stream:
    """A stream: what is put on it runs in that order. Several threads may use it.

    Whoever puts several things on the stream that belong together (addresses, then a launch) holds :attr:`lock`.

    Args:
        device: the number of the GPU; None is the current one.

    Attributes:
        handle: the stream's address, as other libraries take it.
        lock: a reentrant lock; each method holds it. To hold it makes the GPU the current one of the thread.
    """

    def __init__(self, device: int | None = None) -> None:
        self.lock = _Turn(int(call("cudaGetDevice")) if device is None else device)
        with self.lock:
            stream = call("cudaStreamCreate")
        self.handle = int(stream)
        self._end = weakref.finalize(self, call_quietly, "cudaStreamDestroy", stream)

    def wait(self) -> None:
        """Wait for what is on the stream, whatever becomes of it."""
        if self._end.alive:
            call_quietly("cudaStreamSynchronize", self.handle)

    def close(self) -> None:
        """Wait for what is on the stream, and end it; again is nothing."""
        self.wait()
        self._end()

    def zeros(self, shape: Sequence[int], dtype: str) -> DeviceArray:
        """Return new memory, all zeros.

        Raises:
            DipgoError: it does not fit into the device's memory; names the sizes.
        """
        size = prod(shape) * Dtype(dtype).itemsize
        memory = _Memory()
        with self.lock:
            try:
                pointer = int(call("cudaMalloc", max(size, 1)))
            except CudaError as error:
                free, total = (value / 1e9 for value in call("cudaMemGetInfo"))
                raise DipgoError(
                    f"the GPU's memory is full: {size / 1e9:.2f} GB needed, {free:.2f} of {total:.2f} GB free; "
                    "export with --graphs segment, which holds every weight once, or a smaller --batch"
                ) from error
            weakref.finalize(memory, call_quietly, "cudaFree", pointer)
            call("cudaMemsetAsync", pointer, 0, size, self.handle)
        return DeviceArray(memory, pointer, shape, dtype)

    def write(self, target: DeviceArray, values: np.ndarray) -> None:
        """Copy values of the host, in the target's shape and cast to its dtype; they may change once this returns."""
        host = np.ascontiguousarray(np.broadcast_to(values, target.shape), Dtype(target.dtype).numpy)
        kind = bindings().cudaMemcpyKind.cudaMemcpyHostToDevice
        with self.lock:
            call("cudaMemcpyAsync", target.pointer, host.ctypes.data, host.nbytes, kind, self.handle)
            call("cudaStreamSynchronize", self.handle)

    def copy(self, target: DeviceArray, source: DeviceArray) -> None:
        """Copy one array into another of the same shape and dtype.

        Raises:
            ValueError: another shape or dtype.
        """
        if target.shape != source.shape or target.dtype != source.dtype:
            raise ValueError(f"{source.dtype} {source.shape} cannot be copied into {target.dtype} {target.shape}")
        kind = bindings().cudaMemcpyKind.cudaMemcpyDeviceToDevice
        with self.lock:
            call("cudaMemcpyAsync", target.pointer, source.pointer, source.bytes, kind, self.handle)

    def read(self, source: DeviceArray) -> np.ndarray:
        """Wait for the stream and return an array's values on the host; bfloat16 becomes float32, which holds it."""
        host = np.empty(source.shape, Dtype(source.dtype).numpy)
        kind = bindings().cudaMemcpyKind.cudaMemcpyDeviceToHost
        with self.lock:
            call("cudaMemcpyAsync", host.ctypes.data, source.pointer, host.nbytes, kind, self.handle)
            call("cudaStreamSynchronize", self.handle)
        return host.astype(np.float32) if source.dtype == "bfloat16" else host

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Return what ``work`` puts on the stream as one launch: a CUDA graph. Nothing runs while it is captured.

        What ``work`` uses must stay where it is for as long as the launch is used; the launch keeps ``work`` alive.

        Raises:
            CudaError: something in it cannot be captured; the stream can be used on.
        """
        # Relaxed: memory that Python happens to free meanwhile would break a stricter capture, and is none of its.
        mode = bindings().cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed
        with self.lock:
            call("cudaStreamBeginCapture", self.handle, mode)
            try:
                work()
            except BaseException:
                call_quietly("cudaStreamEndCapture", self.handle)
                raise
            graph = call("cudaStreamEndCapture", self.handle)
            try:
                executable = call("cudaGraphInstantiate", graph, 0)
            finally:
                call_quietly("cudaGraphDestroy", graph)

        def launch(_work: Callable[[], None] = work) -> None:
            with self.lock:
                call("cudaGraphLaunch", executable, self.handle)

        weakref.finalize(launch, call_quietly, "cudaGraphExecDestroy", executable)
        return launch


class _Turn:
    """A reentrant lock. While a thread holds it a GPU is the thread's current one; then the one before is again."""

    def __init__(self, device: int) -> None:
        self._lock, self._device = threading.RLock(), device
        self._before: list[int] = []

    def __enter__(self) -> None:
        self._lock.acquire()
        try:
            before = int(call("cudaGetDevice"))
            if before != self._device:
                call("cudaSetDevice", self._device)
        except BaseException:
            self._lock.release()
            raise
        self._before.append(before)

    def __exit__(self, *error: object) -> None:
        before = self._before.pop()
        if before != self._device:
            call_quietly("cudaSetDevice", before)
        self._lock.release()


class _Memory:
    """Stands for an allocation: it is freed when the last array on it is gone."""
