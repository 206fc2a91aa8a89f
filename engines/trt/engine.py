"""An engine in the GPU's memory, and launches of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dipgo.base.errors import DipgoError
from engines.cuda.runtime import CudaError
from engines.cuda.stream import DeviceArray, Stream
from engines.trt.library import Library
from engines.trt.loader import tensors_of


class LoadedEngine:
    """An engine and its one context. Not for several threads at once.

    Attributes:
        tensors: dtypes of inputs and outputs by name.
        outputs: the names of the outputs.
        activations: bytes that the context needs while it runs.
    """

    def __init__(self, library: Library, engine: Any, path: Path, errors: list[str]) -> None:
        trt = library.module
        self._errors, self._path = errors, path
        self._engine = engine
        self.tensors = tensors_of(library, engine)
        self.outputs = [name for name in self.tensors if engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT]
        self.activations = max(int(engine.device_memory_size_v2), 1)
        self._context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if self._context is None:
            raise DipgoError(f"{path}: no execution context; {self._last()}")
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._arena: DeviceArray | None = None

    def shapes_for(self, inputs: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all tensors for these shapes of inputs.

        Raises:
            DipgoError: a shape that the engine was not built for.
        """
        for name, shape in inputs.items():
            # only where it changes: TensorRT prepares anew after it, which a CUDA graph must not catch
            if name in self.tensors and self._shapes.get(name) != shape:
                if not self._context.set_input_shape(name, shape):
                    raise DipgoError(f"{self._path}: not built for '{name}' of shape {list(shape)}; {self._last()}")
                self._shapes[name] = shape
        return {name: tuple(self._context.get_tensor_shape(name)) for name in self.tensors}

    def launch(self, arrays: Mapping[str, DeviceArray], arena: DeviceArray, stream: Stream) -> None:
        """Put one run on the stream; the arrays must stay until it has ended.

        Raises:
            CudaError: TensorRT did not take it.
        """
        context = self._context
        if self._arena is not arena:
            context.set_device_memory(arena.pointer, arena.bytes)
            self._arena = arena
        for name in self.tensors:
            shape = arrays[name].shape
            if name not in self.outputs and self._shapes.get(name) != shape:
                context.set_input_shape(name, shape)
                self._shapes[name] = shape
            context.set_tensor_address(name, arrays[name].pointer)
        if not context.execute_async_v3(stream.handle):
            raise CudaError(f"{self._path}: the launch failed; {self._last()}")

    def _last(self) -> str:
        return self._errors[-1][:300] if self._errors else "TensorRT gives no reason"
