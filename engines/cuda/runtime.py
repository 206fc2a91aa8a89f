"""Memory and launches on a CUDA device, without torch: arrays, one stream, whole pieces of work as CUDA graphs.

The runtime is ``cuda-bindings``, which brings CUDA's runtime along and asks for nothing but a driver. It is imported
when it is first needed.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from dipgo.base.errors import DipgoError
from engines.backend import numpy_type

INSTALL = "run: pip install 'cuda-bindings>=13,<14' (or <13 for a driver of CUDA 12)"


@dataclass(frozen=True)
class Device:
    """A GPU; ``capability`` is its compute capability as one number (90 is 9.0), ``bytes`` its memory."""

    name: str
    capability: int
    bytes: int


class CudaError(DipgoError):
    """A call of CUDA's runtime failed, or there is no GPU for it."""


def find_device() -> Device | None:
    """Return the current CUDA device; None where there is no GPU, or no driver that goes with ``cuda-bindings``.

    Raises:
        DipgoError: ``cuda-bindings`` is not installed, so that nobody can tell.
    """
    try:
        return open_device()
    except CudaError:
        return None


def open_device() -> Device:
    """Return the current CUDA device.

    Raises:
        CudaError: no GPU can be used; says why.
        DipgoError: ``cuda-bindings`` is not installed.
    """
    try:
        count = _call("cudaGetDeviceCount")
        if not count:
            raise CudaError("no CUDA device")
        properties = _call("cudaGetDeviceProperties", _call("cudaGetDevice"))
    except CudaError as error:
        raise CudaError(f"no GPU can be used here ({error}); run it where nvidia-smi lists one") from error
    name = properties.name.decode() if isinstance(properties.name, bytes) else str(properties.name)
    return Device(name, 10 * properties.major + properties.minor, properties.totalGlobalMem)


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
        return prod(self.shape) * item_bytes(self.dtype)

    def __getitem__(self, index: int, /) -> DeviceArray:
        """Return a view of one row; negative indices count from the end."""
        count = self.shape[0]
        if not -count <= index < count:
            raise IndexError(f"row {index} of {count}")
        row = self.shape[1:]
        offset = index % count * prod(row) * item_bytes(self.dtype)
        return DeviceArray(self._memory, self.pointer + offset, row, self.dtype)

    def reshape(self, *shape: int) -> DeviceArray:
        """Return a view in another shape of the same size; one entry may be -1."""
        size = prod(self.shape)
        if -1 in shape:
            known = -prod(shape)
            if known == 0 or size % known:
                raise ValueError(f"cannot reshape {self.shape} into {shape}")
            shape = tuple(size // known if entry == -1 else entry for entry in shape)
        if prod(shape) != size:
            raise ValueError(f"cannot reshape {self.shape} into {shape}")
        return DeviceArray(self._memory, self.pointer, shape, self.dtype)


class Stream:
    """A stream: what is put on it runs in that order. Several threads may use it.

    Whoever puts several things on the stream that belong together (addresses, then a launch) holds :attr:`lock`.

    Attributes:
        handle: the stream's address, as other libraries take it.
        lock: a reentrant lock; each method holds it.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        stream = _call("cudaStreamCreate")
        self.handle = int(stream)
        self._end = weakref.finalize(self, _quietly, "cudaStreamDestroy", stream)

    def wait(self) -> None:
        """Wait for what is on the stream, whatever becomes of it."""
        if self._end.alive:
            _quietly("cudaStreamSynchronize", self.handle)

    def close(self) -> None:
        """Wait for what is on the stream, and end it; again is nothing."""
        self.wait()
        self._end()

    def zeros(self, shape: Sequence[int], dtype: str) -> DeviceArray:
        """Return new memory, all zeros.

        Raises:
            DipgoError: it does not fit into the device's memory; names the sizes.
        """
        array = self._allocate(shape, dtype)
        with self.lock:
            _call("cudaMemsetAsync", array.pointer, 0, array.bytes, self.handle)
        return array

    def write(self, target: DeviceArray, values: np.ndarray) -> None:
        """Copy values of the host, in the target's shape and cast to its dtype; they may change once this returns."""
        host = np.ascontiguousarray(np.broadcast_to(values, target.shape), numpy_type(target.dtype))
        kind = _runtime().cudaMemcpyKind.cudaMemcpyHostToDevice
        with self.lock:
            _call("cudaMemcpyAsync", target.pointer, host.ctypes.data, host.nbytes, kind, self.handle)
            _call("cudaStreamSynchronize", self.handle)

    def copy(self, target: DeviceArray, source: DeviceArray) -> None:
        """Copy one array into another of the same shape and dtype.

        Raises:
            ValueError: another shape or dtype.
        """
        if target.shape != source.shape or target.dtype != source.dtype:
            raise ValueError(f"{source.dtype} {source.shape} cannot be copied into {target.dtype} {target.shape}")
        kind = _runtime().cudaMemcpyKind.cudaMemcpyDeviceToDevice
        with self.lock:
            _call("cudaMemcpyAsync", target.pointer, source.pointer, source.bytes, kind, self.handle)

    def read(self, source: DeviceArray) -> np.ndarray:
        """Wait for the stream and return an array's values on the host; bfloat16 becomes float32, which holds it."""
        host = np.empty(source.shape, numpy_type(source.dtype))
        kind = _runtime().cudaMemcpyKind.cudaMemcpyDeviceToHost
        with self.lock:
            _call("cudaMemcpyAsync", host.ctypes.data, source.pointer, host.nbytes, kind, self.handle)
            _call("cudaStreamSynchronize", self.handle)
        return host.astype(np.float32) if source.dtype == "bfloat16" else host

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Return what ``work`` puts on the stream as one launch: a CUDA graph. Nothing runs while it is captured.

        What ``work`` uses must stay where it is for as long as the launch is used; the launch keeps ``work`` alive.

        Raises:
            CudaError: something in it cannot be captured; the stream can be used on.
        """
        # Relaxed: memory that Python happens to free meanwhile would break a stricter capture, and is none of its.
        mode = _runtime().cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed
        with self.lock:
            _call("cudaStreamBeginCapture", self.handle, mode)
            try:
                work()
            except BaseException:
                _quietly("cudaStreamEndCapture", self.handle)
                raise
            graph = _call("cudaStreamEndCapture", self.handle)
            try:
                executable = _call("cudaGraphInstantiate", graph, 0)
            finally:
                _quietly("cudaGraphDestroy", graph)

        def launch(_work: Callable[[], None] = work) -> None:
            with self.lock:
                _call("cudaGraphLaunch", executable, self.handle)

        weakref.finalize(launch, _quietly, "cudaGraphExecDestroy", executable)
        return launch

    def _allocate(self, shape: Sequence[int], dtype: str) -> DeviceArray:
        size = prod(shape) * item_bytes(dtype)
        memory = _Memory()
        try:
            pointer = int(_call("cudaMalloc", max(size, 1)))
        except CudaError as error:
            free, total = _call("cudaMemGetInfo")
            raise DipgoError(
                f"the GPU's memory is full: {size / 1e9:.2f} GB wanted, {free / 1e9:.2f} of {total / 1e9:.2f} GB free; "
                "export with --graphs segment, which holds every weight once, or a smaller --batch"
            ) from error
        weakref.finalize(memory, _quietly, "cudaFree", pointer)
        return DeviceArray(memory, pointer, shape, dtype)


class _Memory:
    """Stands for an allocation: it is freed when the last array on it is gone."""


def item_bytes(dtype: str) -> int:
    """Return the bytes of one value; ``dtype`` is numpy's name, or ``bfloat16``."""
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize


def _runtime() -> Any:
    try:
        from cuda.bindings import runtime  # type: ignore[import-untyped]
    except ImportError as error:
        raise DipgoError(f"cuda-bindings is not installed; {INSTALL}") from error
    return runtime


def _call(name: str, *arguments: Any) -> Any:
    """Call a function of CUDA's runtime; returns its one result, several as a tuple, or None."""
    cuda = _runtime()
    status, *results = getattr(cuda, name)(*arguments)
    if int(status):
        text = cuda.cudaGetErrorString(status)[1]
        raise CudaError(f"{name}: {text.decode() if isinstance(text, bytes) else text}")
    if len(results) > 1:
        return tuple(results)
    return results[0] if results else None


def _quietly(name: str, *arguments: Any) -> None:
    """Call it where nothing can be done about a failure: while things are taken down."""
    try:
        _call(name, *arguments)
    except Exception:  # the interpreter may be shutting down
        return
