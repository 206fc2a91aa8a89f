"""A TensorRT that runs graphs with ONNX Runtime on the memory of :mod:`tests.engines.fake_cuda`.

Every name that is used on it, and every call's arguments, are checked against the real Python bindings: what is not in
TensorRT 10.16, 11.4 and TensorRT-RTX 1.7 alike raises :class:`tests.engines.tensorrt_api.NotInTheApi`.
"""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from tests.engines.fake_cuda import OK, FakeCuda
from tests.engines.tensorrt_api import Checked, Member, Names, check_call

ELEMENTS = {1: "FLOAT", 10: "HALF", 16: "BF16", 7: "INT64", 6: "INT32", 9: "BOOL"}
NUMPY = {"FLOAT": "float32", "HALF": "float16", "INT64": "int64", "INT32": "int32", "BOOL": "bool"}


class FakeTensorRt:
    """The module ``tensorrt``.

    Attributes:
        contexts: every execution context that was made.
        refitted: the graphs that engines were refitted from.
    """

    def __init__(self, cuda: FakeCuda, version: str = "11.4.0.106") -> None:
        self.__version__ = version
        self.contexts: list[Any] = []
        self.refitted: list[str] = []
        module = self

        class Made(Checked):
            """What the module's own functions make."""

            def __init__(self, *arguments: Any) -> None:
                check_call(type(self).__name__, "__init__", arguments, {})
                self._given = arguments

        class ILogger(Checked, metaclass=Names):
            def __init__(self) -> None:
                pass

        class ITensor(Checked):
            def __init__(self, value: Any) -> None:
                kind = value.type.tensor_type
                self.name, self.dtype = value.name, Member(f"DataType.{ELEMENTS[kind.elem_type]}")
                self.shape = tuple(-1 if size.dim_param else size.dim_value for size in kind.shape.dim)

        class IAttention(Checked):
            def __init__(self) -> None:
                self.decomposable = False

        class ILayer(Checked):
            def __init__(self, node: Any) -> None:
                self._attention = IAttention()
                self.type = Member("LayerType.ATTENTION_INPUT" if node.op_type == "Attention" else "LayerType.SHUFFLE")

        class IAttentionBoundaryLayer(ILayer):
            @property
            def attention(self) -> IAttention:
                return self._attention

        class INetworkDefinition(Checked):
            def _parse(self, path: str) -> None:
                graph = onnx.load(path, load_external_data=False).graph
                self._graph, self._layers = path, [ILayer(node) for node in graph.node]
                inputs, outputs = ([ITensor(value) for value in values] for values in (graph.input, graph.output))
                self.num_inputs, self.num_outputs, self.num_layers = map(len, (inputs, outputs, self._layers))
                self.get_input, self.get_output = inputs.__getitem__, outputs.__getitem__
                self.get_layer = self._layers.__getitem__

        class OnnxParser(Made):
            num_errors = 0

            def parse_from_file(self, model: str) -> bool:
                self._given[0]._parse(model)
                return True

        class ITimingCache(Checked):
            def __init__(self, kernels: set[str]) -> None:
                self._kernels = kernels

            def serialize(self) -> bytes:
                return b"timings " + " ".join(sorted(self._kernels)).encode()

            def combine(self, input_cache: ITimingCache, ignore_mismatch: bool) -> bool:
                self._kernels |= input_cache._kernels
                return True

        class IOptimizationProfile(Checked):
            def __init__(self) -> None:
                self._ranges: dict[str, Any] = {}

            def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
                self._ranges[input] = (min, opt, max)

        class IBuilderConfig(Checked):
            builder_optimization_level = 3
            _profile: IOptimizationProfile | None = None

            def __init__(self) -> None:
                self._flags: set[Any] = {"BuilderFlag.TF32"}
                self._timing: ITimingCache | None = None

            def set_flag(self, flag: Any) -> None:
                self._flags.add(flag)

            def clear_flag(self, flag: Any) -> None:
                self._flags.discard(flag)

            def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
                self._profile = profile
                return 0

            def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache | None:
                if serialized_timing_cache and not serialized_timing_cache.startswith(b"timings"):
                    return None
                return ITimingCache(set(serialized_timing_cache.decode().split()[1:]))

            def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
                self._timing = cache
                return True

            def get_timing_cache(self) -> ITimingCache | None:
                return self._timing

        class Builder(Made):
            def create_network(self, flags: int = 0) -> INetworkDefinition:
                return INetworkDefinition()

            def create_optimization_profile(self) -> IOptimizationProfile:
                return IOptimizationProfile()

            def create_builder_config(self) -> IBuilderConfig:
                return IBuilderConfig()

            def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> bytes | None:
                inputs = [network.get_input(index) for index in range(network.num_inputs)]
                dynamic = {value.name for value in inputs if -1 in value.shape}
                if dynamic != set(config._profile._ranges if config._profile else ()):
                    self._given[0].log(module.ILogger.ERROR, "Network has dynamic inputs without a profile")
                    return None
                for layer in network._layers:
                    if layer._attention.decomposable != (layer.type == "LayerType.ATTENTION_INPUT"):
                        self._given[0].log(module.ILogger.ERROR, "Attention operation was not supported")
                        return None
                if config._timing is not None:
                    config._timing._kernels.add(Path(network._graph).stem)
                plan = {"graph": network._graph, "tf32": "BuilderFlag.TF32" in config._flags}
                plan["stripped"] = {"BuilderFlag.STRIP_PLAN", "BuilderFlag.REFIT_IDENTICAL"} <= config._flags
                plan["ranges"] = config._profile._ranges if config._profile else {}
                return json.dumps(plan).encode()

        class ICudaEngine(Checked):
            def __init__(self, plan: dict[str, Any]) -> None:
                self._graph, self._stripped, self._ranges = plan["graph"], plan["stripped"], plan["ranges"]
                model = onnx.load(self._graph, load_external_data=False)
                self._inputs = {value.name: ITensor(value) for value in model.graph.input}
                self._outputs = {value.name: ITensor(value) for value in model.graph.output}
                self._tensors = self._inputs | self._outputs
                self.device_memory_size_v2 = 1000 * len(model.graph.node)

            @property
            def num_io_tensors(self) -> int:
                return len(self._tensors)

            def get_tensor_name(self, index: int) -> str:
                return list(self._tensors)[index]

            def get_tensor_dtype(self, name: str) -> Any:
                return self._tensors[name].dtype

            def get_tensor_mode(self, name: str) -> Any:
                return Member("TensorIOMode.OUTPUT" if name in self._outputs else "TensorIOMode.INPUT")

            def create_execution_context(self, strategy: Any) -> IExecutionContext:
                assert strategy == "ExecutionContextAllocationStrategy.USER_MANAGED"
                return IExecutionContext(self)

        class IExecutionContext(Checked):
            def __init__(self, engine: ICudaEngine) -> None:
                assert not engine._stripped, "run without its weights"
                self._engine, self._addresses, self._memory = engine, dict[str, int](), (0, 0)
                self._shapes: dict[str, tuple[int, ...]] = {}
                self._session = onnxruntime.InferenceSession(engine._graph, providers=["CPUExecutionProvider"])
                module.contexts.append(self)

            def set_device_memory(self, memory: int, size: int) -> None:
                self._memory = (memory, size)

            def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
                built = self._engine._inputs[name].shape
                least, _, most = self._engine._ranges.get(name, (built, built, built))
                if not all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True)):
                    return False
                self._shapes[name] = tuple(shape)
                return True

            def get_tensor_shape(self, name: str) -> tuple[int, ...]:
                if -1 not in self._engine._tensors[name].shape:
                    return self._engine._tensors[name].shape
                if name in self._shapes:
                    return self._shapes[name]
                zeros = {
                    key: np.zeros(self._shape_of(key), _numpy(value)) for key, value in self._engine._inputs.items()
                }
                return tuple(self._session.run([name], zeros)[0].shape)

            def _shape_of(self, name: str) -> tuple[int, ...]:
                return self._shapes.get(name, self._engine._tensors[name].shape)

            def set_tensor_address(self, name: str, memory: int) -> bool:
                self._addresses[name] = memory
                return True

            def execute_async_v3(self, stream_handle: int) -> bool:
                pointer, size = self._memory
                assert size >= self._engine.device_memory_size_v2
                assert pointer in cuda.live, "the arena is gone"
                arrays = {
                    name: _array(address, self.get_tensor_shape(name), _numpy(self._engine._tensors[name]))
                    for name, address in self._addresses.items()
                }

                def work() -> None:
                    ctypes.memset(pointer, 0xCD, size)  # nobody may count on what is in the arena
                    inputs = {name: arrays[name].copy() for name in self._engine._inputs}
                    outputs = list(self._engine._outputs)
                    for name, value in zip(outputs, self._session.run(outputs, inputs), strict=True):
                        arrays[name][...] = value

                return cuda.put(Path(self._engine._graph).name, work) == OK

        class Runtime(Made):
            def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine | None:
                return ICudaEngine(json.loads(bytes(serialized_engine)))

        class Refitter(Made):
            _graph = ""

            def refit_cuda_engine(self) -> bool:
                engine = self._given[0]
                engine._stripped = engine._graph != self._graph
                return not engine._stripped

        class OnnxParserRefitter(Made):
            def refit_from_file(self, model: str) -> bool:
                self._given[0]._graph = model
                module.refitted.append(Path(model).name)
                return True

        for kind in (Builder, OnnxParser, Runtime, Refitter, OnnxParserRefitter, ILogger, IAttentionBoundaryLayer):
            setattr(self, kind.__name__, kind)
        enumerations = "BuilderFlag LayerType DataType TensorIOMode NetworkDefinitionCreationFlag"
        for name in (*enumerations.split(), "ExecutionContextAllocationStrategy"):
            setattr(self, name, Names(name, (), {}))


def _numpy(tensor: Any) -> np.dtype[Any]:
    return np.dtype(NUMPY[tensor.dtype.removeprefix("DataType.")])


def _array(address: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    memory = (ctypes.c_char * (int(np.prod(shape)) * dtype.itemsize)).from_address(address)
    return np.frombuffer(memory, dtype).reshape(shape)
