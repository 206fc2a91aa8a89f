"""The backends by name. Each is imported when it is chosen."""

from __future__ import annotations

from importlib import import_module

from dipgo.base.errors import UsageError
from engines.backend import Runner
from export.bundle import Bundle

DEFAULT = "onnxruntime"

BACKENDS: dict[str, tuple[str, str, dict[str, str]]] = {
    "onnxruntime": ("engines.onnxrt.runner", "OnnxRuntimeRunner", {}),
    "tensorrt": ("engines.trt.runner", "TensorRtRunner", {}),
    "onnxruntime-cuda": ("engines.onnxrt.cuda", "CudaRunner", {"provider": "CUDAExecutionProvider"}),
    "onnxruntime-tensorrt": ("engines.onnxrt.cuda", "CudaRunner", {"provider": "TensorrtExecutionProvider"}),
    "torch": ("engines.torchrt.runner", "TorchRunner", {}),
    "torch-cpu": ("engines.torchrt.runner", "TorchRunner", {"device": "cpu"}),
    "torch-compile": ("engines.torchrt.runner", "TorchRunner", {"way": "compiled"}),
    "torch-aot": ("engines.torchrt.runner", "TorchRunner", {"way": "AOTInductor"}),
}
"""The module of each backend, and the runner in it: from a bundle, a number of threads, and these options."""


def runner_for(bundle: Bundle, backend: str = DEFAULT, threads: int | None = None) -> Runner:
    """Return a runner for a bundle; nothing is loaded before it is entered.

    Raises:
        UsageError: an unknown backend.
        DipgoError: what the backend needs is not installed, or not on this machine.
    """
    if backend not in BACKENDS:
        raise UsageError(f"unknown backend '{backend}'; use {', '.join(BACKENDS)}")
    module, kind, options = BACKENDS[backend]
    runner: Runner = getattr(import_module(module), kind)(bundle, threads, **options)
    return runner
