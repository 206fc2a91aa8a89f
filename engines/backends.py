"""The backends by name. Each is imported when it is chosen."""

from __future__ import annotations

from importlib import import_module

from dipgo.base.errors import UsageError
from engines.backend import Runner
from export.bundle import Bundle

DEFAULT = "onnxruntime"

BACKENDS = {
    "onnxruntime": ("engines.onnxrt.runner", "cpu_runner"),
    "tensorrt": ("engines.trt.runner", "tensorrt_runner"),
    "onnxruntime-cuda": ("engines.onnxrt.cuda", "cuda_runner"),
    "onnxruntime-tensorrt": ("engines.onnxrt.cuda", "tensorrt_runner"),
    "torch": ("engines.torchrt.runner", "eager_runner"),
    "torch-cpu": ("engines.torchrt.runner", "eager_cpu_runner"),
    "torch-compile": ("engines.torchrt.runner", "compiling_runner"),
    "torch-aot": ("engines.torchrt.runner", "package_runner"),
}
"""The module of each backend, and the function in it that makes a runner from a bundle and a number of threads."""


def runner_for(bundle: Bundle, backend: str = DEFAULT, threads: int | None = None) -> Runner:
    """Return a runner for a bundle; nothing is loaded before it is entered.

    Raises:
        UsageError: an unknown backend.
        DipgoError: what the backend needs is not installed, or not on this machine.
    """
    if backend not in BACKENDS:
        raise UsageError(f"unknown backend '{backend}'; use {', '.join(BACKENDS)}")
    module, function = BACKENDS[backend]
    runner: Runner = getattr(import_module(module), function)(bundle, threads)
    return runner
