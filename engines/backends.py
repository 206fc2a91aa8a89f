"""The backends by name. Each is imported when it is chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module

from dipgo.base.errors import UsageError
from engines.backend import Runner
from engines.devices import place_of
from export.bundle import Bundle

DEFAULT = "onnxruntime"
BEST_ON_GPU = "cuda"
"""Stands for the best backend that can run a bundle on a GPU here; see :mod:`engines.best`."""


@dataclass(frozen=True)
class Entry:
    """A backend: its module, the runner in it, the kinds of device that it runs on, and what the runner is told.

    A runner is made of a bundle, a number of threads and these options; one that can run on a GPU takes ``device`` too.
    """

    module: str
    runner: str
    kinds: tuple[str, ...]
    options: Mapping[str, str] = field(default_factory=dict)


_ONNXRUNTIME, _TORCH = "engines.onnxrt.cuda", "engines.torchrt.runner"
_ANY, _CPU, _GPU = ("cpu", "cuda"), ("cpu",), ("cuda",)

BACKENDS: dict[str, Entry] = {
    "onnxruntime": Entry("engines.onnxrt.runner", "OnnxRuntimeRunner", _CPU),
    "tensorrt": Entry("engines.trt.runner", "TensorRtRunner", _GPU),
    "onnxruntime-cuda": Entry(_ONNXRUNTIME, "CudaRunner", _GPU, {"provider": "CUDAExecutionProvider"}),
    "onnxruntime-tensorrt": Entry(_ONNXRUNTIME, "CudaRunner", _GPU, {"provider": "TensorrtExecutionProvider"}),
    "onnxruntime-tensorrt-rtx": Entry(_ONNXRUNTIME, "CudaRunner", _GPU, {"provider": "NvTensorRTRTXExecutionProvider"}),
    "torch": Entry(_TORCH, "TorchRunner", _ANY),
    "torch-cpu": Entry(_TORCH, "TorchRunner", _CPU, {"device": "cpu"}),
    "torch-compile": Entry(_TORCH, "TorchRunner", _ANY, {"way": "compiled"}),
    "torch-aot": Entry(_TORCH, "TorchRunner", _ANY, {"way": "AOTInductor"}),
}


def runner_for(bundle: Bundle, backend: str = DEFAULT, threads: int | None = None, device: str | None = None) -> Runner:
    """Return a runner for a bundle; nothing is loaded before it is entered.

    Args:
        backend: a name in :data:`BACKENDS`, or ``cuda`` for the best on a GPU.
        threads: of backends on the CPU; None leaves the choice to them.
        device: ``cpu``, ``cuda`` or ``cuda:N``; None is the backend's own choice.

    Raises:
        UsageError: an unknown backend or device, or a device that the backend does not run on.
        DipgoError: what the backend needs is not installed, or not on this machine.
    """
    if backend not in BACKENDS and backend != BEST_ON_GPU:
        raise UsageError(f"unknown backend '{backend}'; use {', '.join([*BACKENDS, BEST_ON_GPU])}")
    place = place_of(device) if device else None
    kinds = _GPU if backend == BEST_ON_GPU else BACKENDS[backend].kinds
    if place and place.kind not in kinds:
        others = ", ".join(name for name, entry in BACKENDS.items() if place.kind in entry.kinds)
        raise UsageError(f"device '{place}': backend '{backend}' does not run there; use one of {others}")
    if backend == BEST_ON_GPU:
        from engines.best import best_on_gpu

        backend = best_on_gpu(bundle, place)
    entry = BACKENDS[backend]
    chosen = {"device": str(place)} if place and "cuda" in entry.kinds else {}
    runner: Runner = getattr(import_module(entry.module), entry.runner)(bundle, threads, **entry.options, **chosen)
    return runner
