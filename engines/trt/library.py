"""Which TensorRT this machine has, and what its engines are built for."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from dipgo.base import install
from dipgo.base.dtypes import Dtype
from dipgo.base.errors import DipgoError
from engines.cuda.runtime import Device

RTX_LEAST = 80  # compute capability from which TensorRT-RTX's portable engines run

DTYPES = (Dtype.FLOAT32, Dtype.FLOAT16, Dtype.BFLOAT16, Dtype.INT64, Dtype.INT32, Dtype.BOOL)
"""What goes in and out of engines."""

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}


@dataclass(frozen=True)
class Library:
    """A TensorRT that imports.

    Attributes:
        name: ``tensorrt`` or ``tensorrt-rtx``.
        module: the Python module.
    """

    name: str
    module: Any

    @property
    def version(self) -> str:
        return str(self.module.__version__)

    @property
    def portable(self) -> bool:
        """Whether engines are built without a GPU, for all of its kind."""
        return self.name == "tensorrt-rtx"

    def target(self, device: Device | None) -> str:
        """Return what engines built here run on, for names and keys: ``sm90``, or ``sm80plus`` where they are portable.

        Raises:
            DipgoError: no engine can be built for this device, or none without one.
        """
        if self.portable:
            if device is not None and device.capability < RTX_LEAST:
                raise DipgoError(
                    f"{device.name}: TensorRT-RTX's portable engines need compute capability 8.0, this one has "
                    f"{device.capability / 10}; use --backend onnxruntime-cuda"
                )
            return f"sm{RTX_LEAST}plus"
        if device is None:
            raise DipgoError(
                "TensorRT builds engines on the GPU that they are for, and none can be used here ('dipgo doctor' says "
                f"why); build there, or {install.extra('tensorrt-rtx')}"
            )
        return f"sm{device.capability}"


def find_library(device: Device | None) -> Library:
    """Return the TensorRT to use: full TensorRT where there is a GPU, else TensorRT-RTX, which builds without one.

    Raises:
        DipgoError: neither is installed.
    """
    order = ["tensorrt", "tensorrt-rtx"] if device is not None else ["tensorrt-rtx", "tensorrt"]
    for name in order:
        try:
            return library_named(name)
        except ImportError:
            continue
    raise DipgoError(f"TensorRT is not installed; {install.TENSORRT}")


def library_named(name: str) -> Library:
    """Return the library of this name.

    Raises:
        ImportError: it is not installed, or its own libraries are not.
    """
    module = import_module(MODULES[name])
    if not hasattr(module, "Builder"):
        raise ImportError(f"{MODULES[name]} is there without its libraries")
    return Library(name, module)


def listener(library: Library) -> tuple[Any, list[str]]:
    """Return a logger for the library and the list in which it puts errors, one line each."""
    base = library.module.ILogger
    errors: list[str] = []

    class Listener(base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            base.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (base.INTERNAL_ERROR, base.ERROR):
                errors.append(" ".join(str(message).split()))

    return Listener(), errors


def dtype_names(library: Library) -> dict[Any, str]:
    """Return the names of types (see :class:`Dtype`) by the library's own."""
    return {getattr(library.module.DataType, dtype.tensorrt): dtype.value for dtype in DTYPES}
