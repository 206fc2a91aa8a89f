"""An onnxruntime for GPUs that computes with the real one on the memory of :mod:`tests.engines.fake_cuda`.

Sessions take what the real ones take: every option and argument is checked here, and ``test_onnxrt_cuda.py`` checks
the names against the real package. Providers' options are those that their documentation lists.
"""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime

from tests.engines.fake_cuda import OK, FakeCuda

CUDA, TENSORRT, RTX = "CUDAExecutionProvider", "TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider"
OPTIONS = {
    CUDA: {"device_id", "user_compute_stream", "use_tf32"},
    TENSORRT: {"device_id", "user_compute_stream", "trt_fp16_enable", "trt_bf16_enable", "trt_engine_cache_enable"}
    | {"trt_engine_cache_path", "trt_timing_cache_enable", "trt_timing_cache_path"},
    RTX: {"has_user_compute_stream", "user_compute_stream", "nv_runtime_cache_path"},  # of 0.5.0's own header
}


class FakeOnnxRuntime:
    """The module ``onnxruntime``, and by :attr:`plugin` the module ``onnxruntime_ep_nv_tensorrt_rtx``.

    Attributes:
        given: for each session its provider and the provider's options.
        on_host: files whose nodes do not all run on the GPU.
        rtx_devices: how many GPUs the plugin takes.
    """

    __version__ = "1.32.0"
    RunOptions = onnxruntime.RunOptions

    def __init__(self, cuda: FakeCuda) -> None:
        self.given: list[tuple[str, dict[str, str]]] = []
        self.on_host: set[str] = set()
        self.rtx_devices, self._registered = cuda.count, 0
        self.plugin = SimpleNamespace(get_ep_name=lambda: RTX, get_library_path=lambda: "/plugin.so")
        module = self

        class SessionOptions(onnxruntime.SessionOptions):  # type: ignore[misc]
            entries: dict[str, str]
            devices: tuple[Any, dict[str, str]] | None = None

            def add_session_config_entry(self, key: str, value: str) -> None:
                self.__dict__.setdefault("entries", {})[key] = value
                super().add_session_config_entry(key, "0" if key == "session.disable_cpu_ep_fallback" else value)

            def add_provider_for_devices(self, devices: list[Any], options: dict[str, str]) -> None:
                self.devices = (devices, options)

        class InferenceSession:
            def __init__(self, model: Any, options: Any, providers: Any = None) -> None:
                if providers is None:
                    (device,), own = options.devices
                    assert device.ep_name == RTX
                    providers = [(RTX, own)]
                for provider, own in providers:
                    assert own.keys() <= OPTIONS[provider], f"{provider} has no {own.keys() - OPTIONS[provider]}"
                strict = options.entries["session.disable_cpu_ep_fallback"] == "1"
                if strict and any(str(file) in str(model) for file in module.on_host):
                    raise RuntimeError("nodes are assigned to the CPU")
                module.given.append(providers[0])
                self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
                self.get_providers = lambda: [providers[0][0], "CPUExecutionProvider"]
                self.get_outputs, self.run = self._session.get_outputs, self._session.run

            def io_binding(self) -> Any:
                return IoBinding()

            def run_with_iobinding(self, binding: Any, options: Any) -> None:
                def work() -> None:
                    outputs = self._session.run(list(binding.outputs), dict(binding.inputs))
                    for target, values in zip(binding.outputs.values(), outputs, strict=True):
                        target[...] = values

                assert all(cuda.current == cuda.device_of(array.ctypes.data) for array in binding.outputs.values())
                if cuda.put("session", work) != OK:
                    raise RuntimeError("operation not permitted when stream is capturing")

        class IoBinding:
            def __init__(self) -> None:
                self.inputs: dict[str, np.ndarray] = {}
                self.outputs: dict[str, np.ndarray] = {}

            def bind_input(self, name: str, kind: str, device: int, element: Any, shape: Any, pointer: int) -> None:
                self.inputs[name] = view(kind, device, element, shape, pointer)

            def bind_output(self, name: str, kind: str, device: int, element: Any, shape: Any, pointer: int) -> None:
                self.outputs[name] = view(kind, device, element, shape, pointer)

        def view(kind: str, device: int, element: Any, shape: Any, pointer: int) -> np.ndarray:
            assert (kind, device) == ("cuda", cuda.device_of(pointer))
            size = int(np.prod(shape)) * np.dtype(element).itemsize
            return np.frombuffer((ctypes.c_char * size).from_address(pointer), element).reshape(shape)

        self.SessionOptions, self.InferenceSession = SessionOptions, InferenceSession

    def get_available_providers(self) -> list[str]:
        return [TENSORRT, CUDA, "CPUExecutionProvider"]

    def preload_dlls(self) -> None: ...

    def register_execution_provider_library(self, name: str, path: str) -> None:
        assert (name, path, self._registered) == (RTX, "/plugin.so", 0), "once in a process"
        self._registered = 1

    def get_ep_devices(self) -> list[Any]:
        return [SimpleNamespace(ep_name=RTX) for _ in range(self._registered * self.rtx_devices)]
