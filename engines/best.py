"""The best backend for a bundle on a GPU: the first, in an order that is laid down, that can run here."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from dipgo.base import install
from dipgo.base.errors import DipgoError, UsageError, not_imported
from engines.cuda.runtime import open_device
from engines.devices import Place, check_index
from export.bundle import Bundle


def best_on_gpu(bundle: Bundle, place: Place | None = None) -> str:
    """Return the first backend of :data:`ORDER` that can run a bundle on a GPU; ``place`` says which GPU.

    Raises:
        UsageError: no such GPU.
        DipgoError: none can; says why, backend by backend.
    """
    index, reasons = place.index if place else None, []
    for name, check in ORDER.items():
        try:
            check(bundle, index)
        except UsageError:
            raise
        except DipgoError as error:
            reasons.append(f"{name}: {error}")
        else:
            return name
    raise DipgoError(f"no backend can run this on a GPU here ({'; '.join(reasons)}); use --backend onnxruntime")


def _built_engines(bundle: Bundle, index: int | None) -> None:
    from engines.trt.library import find_library
    from engines.trt.store import all_built

    device = open_device(index)
    if not all_built(bundle, library := find_library(device), library.target(device)):
        raise DipgoError(f"{bundle.folder} holds no engines for this GPU (dipgo build --backend tensorrt)")


def _torch(bundle: Bundle, index: int | None) -> None:
    try:
        import torch
    except ImportError as error:
        raise not_imported("torch", error, install.TORCH) from error
    if not torch.cuda.is_available():
        raise DipgoError("torch sees no GPU")
    check_index(index, torch.cuda.device_count())


def _onnxruntime(provider: str) -> Callable[[Bundle, int | None], None]:
    def check(bundle: Bundle, index: int | None) -> None:
        from engines.onnxrt.providers import require

        require(provider, open_device(index).index)

    return check


ORDER: Mapping[str, Callable[[Bundle, int | None], None]] = {
    "tensorrt": _built_engines,
    "torch": _torch,
    "onnxruntime-tensorrt-rtx": _onnxruntime("NvTensorRTRTXExecutionProvider"),
    "onnxruntime-tensorrt": _onnxruntime("TensorrtExecutionProvider"),
    "onnxruntime-cuda": _onnxruntime("CUDAExecutionProvider"),
}
"""Backends, the best first, each with what raises DipgoError where it cannot run.

TensorRT comes first because somebody has built the bundle's engines for it, then torch, the one that has run on a GPU;
``torch-compile`` and ``torch-aot`` are not among them, because they compile for minutes.
"""
