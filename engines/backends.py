"""The backends by name. Each is imported when it is chosen."""

from __future__ import annotations

from importlib import import_module

from dipgo.base.errors import UsageError
from engines.backend import Runner
from export.bundle import Bundle

DEFAULT = "onnxruntime"

BACKENDS = {
    "onnxruntime": ("engines.onnxrt.runner", "on_cpu"),
    "tensorrt": ("engines.trt.runner", "on_gpu"),
    "onnxruntime-cuda": ("engines.onnxrt.cuda", "on_cuda"),
    "onnxruntime-tensorrt": ("engines.onnxrt.cuda", "on_tensorrt"),
    "torch": ("engines.torchrt.runner", "eager"),
    "torch-cpu": ("engines.torchrt.runner", "eager_on_cpu"),
    "torch-compile": ("engines.torchrt.runner", "compiled"),
    "torch-aot": ("engines.torchrt.runner", "packaged"),
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
