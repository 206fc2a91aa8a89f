"""ONNX Runtime's providers for NVIDIA GPUs: what each needs, and the options that a session gives it.

Two come with ``onnxruntime-gpu``. TensorRT-RTX's is a plugin, which a plain ``onnxruntime`` loads when it is asked for;
each process registers it once.
"""

from __future__ import annotations

import threading
from importlib import import_module
from typing import Any

from dipgo.base import install
from dipgo.base.errors import DipgoError, not_imported
from dipgo.base.files import cache_root
from export.records.bundle import BundleRecord

CUDA, TENSORRT, TENSORRT_RTX = "CUDAExecutionProvider", "TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider"
NAMES = {CUDA: "CUDA", TENSORRT: "TensorRT", TENSORRT_RTX: "TensorRT-RTX"}
_PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"
_REGISTERING = threading.Lock()


def require(provider: str, device: int = 0) -> None:
    """Make a provider ready for a GPU.

    Raises:
        DipgoError: it is not in the installed onnxruntime, its plugin is not installed, or it takes no such GPU.
    """
    cure = install.PLUGIN if provider == TENSORRT_RTX else install.CUDA
    try:
        import onnxruntime
    except ImportError as error:
        raise not_imported("onnxruntime", error, cure) from error
    if provider == TENSORRT_RTX:
        plugin_device(device)
    elif provider not in onnxruntime.get_available_providers():
        raise DipgoError(f"this onnxruntime has no {provider}; {install.CUDA}")
    else:
        onnxruntime.preload_dlls()  # CUDA's and cuDNN's libraries, where they were installed as packages


def add_provider(options: Any, provider: str, record: BundleRecord, device: int, stream: int) -> dict[str, Any]:
    """Have a session run on a GPU and a stream, by its address; returns what ``InferenceSession`` takes besides."""
    own_stream = {"user_compute_stream": str(stream)}
    if provider == TENSORRT_RTX:
        kernels = _cache("onnxruntime-tensorrt-rtx", record)  # which it compiles where an engine first runs
        chosen = own_stream | {"has_user_compute_stream": "1", "nv_runtime_cache_path": kernels}
        options.add_provider_for_devices([plugin_device(device)], chosen)
        return {}
    common = own_stream | {"device_id": str(device)}
    cuda = (CUDA, common | {"use_tf32": str(int(record.dtype != "float32"))})
    return {"providers": [cuda] if provider == CUDA else [(TENSORRT, common | tensorrt_options(record)), cuda]}


def plugin_device(device: int) -> Any:
    """Return ONNX Runtime's name for a GPU under TensorRT-RTX's provider.

    Raises:
        DipgoError: the plugin is not installed or cannot be loaded, or takes no such GPU.
    """
    import onnxruntime

    try:
        plugin = import_module(_PLUGIN)
    except ImportError as error:
        raise not_imported(_PLUGIN, error, install.PLUGIN) from error
    name = plugin.get_ep_name()
    with _REGISTERING:
        try:
            if not any(entry.ep_name == name for entry in onnxruntime.get_ep_devices()):
                onnxruntime.register_execution_provider_library(name, plugin.get_library_path())
        except Exception as error:  # onnxruntime raises a class of its own for each kind of failure
            raise DipgoError(
                f"{name} cannot be loaded ({' '.join(str(error).split())[:200]}); {install.PLUGIN}"
            ) from error
    devices = [entry for entry in onnxruntime.get_ep_devices() if entry.ep_name == name]
    if device >= len(devices):
        raise DipgoError(
            f"TensorRT-RTX's provider takes {len(devices) or 'none'} of the GPUs here, not cuda:{device}; "
            "use --backend onnxruntime-cuda"
        )
    return devices[device]


def tensorrt_options(record: BundleRecord) -> dict[str, str]:
    """Return the TensorRT provider's options: where it keeps engines and timings, and the precision.

    Timings are shared by all bundles. Engines are not: ONNX Runtime finds them by the graph without its weights, so it
    would take those of another bundle.
    """
    return {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": _cache("onnxruntime-tensorrt", record),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(cache_root() / "onnxruntime-tensorrt"),
        "trt_fp16_enable": str(int(record.dtype == "float16")),
        "trt_bf16_enable": str(int(record.dtype == "bfloat16")),
    }


def _cache(name: str, record: BundleRecord) -> str:
    """Return a bundle's own folder for what a provider keeps, made."""
    folder = cache_root() / name / record.sha256[:16]
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder)
