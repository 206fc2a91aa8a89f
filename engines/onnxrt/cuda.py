"""Run a bundle's graphs with ONNX Runtime on a GPU, by its CUDA, its TensorRT or TensorRT-RTX's execution provider.

Buffers lie on the device and are bound by address; everything runs on one stream, nothing waits between launches.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dipgo.base import install
from dipgo.base.dtypes import Dtype
from dipgo.base.errors import DipgoError
from engines.backend import Launch
from engines.cuda.buffers import StreamRunner, warn_of_no_graph
from engines.cuda.runtime import open_device
from engines.cuda.stream import DeviceArray, Stream
from engines.devices import place_of
from engines.onnxrt.providers import CUDA, NAMES, add_provider, require
from export.bundle import Bundle


class CudaRunner(StreamRunner):
    """Sessions of all graphs of a bundle on a GPU, opened on entering the context.

    Every session holds the weights of its graph on the device; ``--graphs segment`` has each block in one graph.

    Raises:
        DipgoError: the provider is not in the installed onnxruntime, or there is no GPU.
    """

    def __init__(self, bundle: Bundle, threads: int | None = None, provider: str = CUDA, device: str = "cuda") -> None:
        super().__init__(bundle)
        index = place_of(device).index
        require(provider, index or 0)
        self.provider, self._device = provider, open_device(index)
        self.label = f"ONNX Runtime {NAMES[provider]}, {self._device.name}"
        self._sessions: dict[str, Any] = {}
        self._on_host: set[str] = set()
        self._files: weakref.WeakKeyDictionary[Launch, str] = weakref.WeakKeyDictionary()

    def __enter__(self) -> CudaRunner:
        self._stream = Stream(self._device.index)
        for file in self.bundle.record.loaded:
            self._session(file)
        return self

    def __exit__(self, *error: object) -> None:
        self._sessions = {}
        self.close_stream()

    def bind(self, file: str, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]) -> Launch:
        session, stream = self._session(file), self.stream
        binding = session.io_binding()
        for name, array in inputs.items():
            binding.bind_input(name, "cuda", self._device.index, _element(array.dtype), array.shape, array.pointer)
        for name, array in outputs.items():
            binding.bind_output(name, "cuda", self._device.index, _element(array.dtype), array.shape, array.pointer)
        options = _without_waiting()
        arrays = (dict(inputs), dict(outputs))

        def launch(_arrays: Any = arrays) -> None:
            with stream.lock:
                session.run_with_iobinding(binding, options)

        self._files[launch] = file
        return launch

    def run(self, file: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        session = self._session(file)
        names = [output.name for output in session.get_outputs()]
        with self.stream.lock:
            return dict(zip(names, session.run(names, dict(inputs)), strict=True))

    def capture(self, launches: Sequence[Launch]) -> Launch | None:
        """Return all launches as one CUDA graph; None, with a warning, where some node runs on the host.

        What runs on the host would not be part of the graph.
        """
        on_host = self._on_host & {self._files[launch] for launch in launches}
        if on_host:
            warn_of_no_graph(f"ONNX Runtime runs nodes of {min(on_host)} on the CPU")
            return None
        if not _keeps_what_graphs_read():
            warn_of_no_graph("ONNX Runtime before 1.30 frees memory that it would read; update onnxruntime-gpu")
            return None
        return super().capture(launches)

    def _session(self, file: str) -> Any:
        with self.stream.lock:
            if file not in self._sessions:
                self._sessions[file] = self._open(file)
            return self._sessions[file]

    def _open(self, file: str) -> Any:
        """Open a session with every node on the device; where that cannot be, with some on the host."""
        import onnxruntime

        path = self.bundle.folder / file
        model = _inlined_first(path) if self.provider == CUDA else str(path)
        failure = ""
        for strict in (True, False):
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 4 if strict else 3  # what the strict one refuses, the other takes
            options.add_session_config_entry("session.disable_cpu_ep_fallback", str(int(strict)))
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
            try:
                chosen = add_provider(
                    options, self.provider, self.bundle.record, self._device.index, self.stream.handle
                )
                session = onnxruntime.InferenceSession(model, options, **chosen)
            except DipgoError:
                raise
            except Exception as error:  # onnxruntime raises a class of its own for each kind of failure
                failure = " ".join(str(error).split())[:300]
                continue
            if session.get_providers()[0] != self.provider:
                raise DipgoError(f"{self.provider} could not be loaded: its libraries are missing; {install.CUDA}")
            if not strict:
                self._on_host.add(file)
            return session
        other = " with --dtype fp16 or fp32" if self.bundle.record.dtype == "bfloat16" else ""  # Resize is in no other
        raise DipgoError(f"{path}: ONNX Runtime refuses it ({failure}); export it again{other}")


def _keeps_what_graphs_read() -> bool:
    """Whether operators that copy from the host while a stream is captured keep what they copy, as Concat does."""
    import onnxruntime

    major, minor = onnxruntime.__version__.split(".")[:2]
    return (int(major), int(minor)) >= (1, 30)


def _inlined_first(path: Path) -> bytes:
    """Return a graph as ONNX Runtime takes it apart best: what it has no kernel for (GroupNormalization), first of all.

    It does so in models that hold a function, and optimises what comes out. In others it comes last, with sizes that
    the host computes at every launch. So here is a function, which nothing calls.
    """
    import onnx

    model = onnx.load(path, load_external_data=False)
    opsets = [onnx.helper.make_opsetid("", opset.version) for opset in model.opset_import if not opset.domain]
    same = onnx.helper.make_node("Identity", ["x"], ["y"])
    model.functions.append(onnx.helper.make_function("dipgo", "Nothing", ["x"], ["y"], [same], opsets))
    model.opset_import.append(onnx.helper.make_opsetid("dipgo", 1))
    return bytes(model.SerializeToString())


def _without_waiting() -> Any:
    import onnxruntime

    options = onnxruntime.RunOptions()
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return options


def _element(dtype: str) -> Any:
    """Return a type as ONNX Runtime's bindings take it: numpy's, but of bfloat16 ONNX's number."""
    return Dtype.BFLOAT16.onnx if dtype == Dtype.BFLOAT16.value else np.dtype(dtype)
