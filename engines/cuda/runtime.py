"""Calls of CUDA's runtime, and which GPU there is.

The runtime is ``cuda-bindings``, which brings CUDA's runtime along and needs nothing but a driver. It is imported when
it is first needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dipgo.base.errors import DipgoError, not_imported
from dipgo.base.install import BINDINGS
from engines.devices import check_index


@dataclass(frozen=True)
class Device:
    """A GPU; ``capability`` is its compute capability as one number (90 is 9.0), ``bytes`` its memory."""

    name: str
    capability: int
    bytes: int
    index: int = 0


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


def open_device(index: int | None = None) -> Device:
    """Return a CUDA device by its number; None is the current one.

    Raises:
        CudaError: no GPU can be used; says why.
        UsageError: no GPU of this number.
        DipgoError: ``cuda-bindings`` is not installed.
    """
    try:
        count = call("cudaGetDeviceCount")
        if not count:
            raise CudaError("no CUDA device")
        check_index(index, count)
        number = int(call("cudaGetDevice")) if index is None else index
        properties = call("cudaGetDeviceProperties", number)
    except CudaError as error:
        raise CudaError(f"no GPU can be used here ({error}); run it where nvidia-smi lists one") from error
    name = properties.name.decode() if isinstance(properties.name, bytes) else str(properties.name)
    return Device(name, 10 * properties.major + properties.minor, properties.totalGlobalMem, number)


def bindings() -> Any:
    """Return the module ``cuda.bindings.runtime``.

    Raises:
        DipgoError: it is not installed.
    """
    try:
        from cuda.bindings import runtime  # type: ignore[import-untyped]
    except ImportError as error:
        raise not_imported("cuda-bindings", error, BINDINGS) from error
    return runtime


def call(name: str, *arguments: Any) -> Any:
    """Call a function of CUDA's runtime; returns its one result, several as a tuple, or None.

    Raises:
        CudaError: it failed; with its name and CUDA's reason.
    """
    cuda = bindings()
    status, *results = getattr(cuda, name)(*arguments)
    if int(status):
        text = cuda.cudaGetErrorString(status)[1]
        raise CudaError(f"{name}: {text.decode() if isinstance(text, bytes) else text}")
    if len(results) > 1:
        return tuple(results)
    return results[0] if results else None


def call_quietly(name: str, *arguments: Any) -> None:
    """Call it where nothing can be done about a failure: while things are taken down."""
    try:
        call(name, *arguments)
    except Exception:  # the interpreter may be shutting down
        return
