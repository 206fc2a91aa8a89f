"""Element types by all their names: numpy's, torch's, ONNX's, safetensors', TensorRT's and the command line's."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import dtype as TorchDtype


class Dtype(Enum):
    """An element type. Its value is the name that numpy, ``ml_dtypes`` and torch share; bundles record it.

    Attributes:
        safetensors: its name in the header of a safetensors file.
        onnx: its number in ONNX, which ``onnx_ir.DataType`` takes.
        tensorrt: its name in TensorRT's ``DataType``.
        short: its name on the command line and in graphs' names; empty where graphs are not made in it.
    """

    FLOAT64 = "float64", "F64", 11, "DOUBLE"
    FLOAT32 = "float32", "F32", 1, "FLOAT", "fp32"
    FLOAT16 = "float16", "F16", 10, "HALF", "fp16"
    BFLOAT16 = "bfloat16", "BF16", 16, "BF16", "bf16"
    FLOAT8_E4M3 = "float8_e4m3fn", "F8_E4M3", 17, "FP8"
    FLOAT8_E5M2 = "float8_e5m2", "F8_E5M2", 19, "FP8_E5M2"
    INT64 = "int64", "I64", 7, "INT64"
    UINT64 = "uint64", "U64", 13, "UINT64"
    INT32 = "int32", "I32", 6, "INT32"
    UINT32 = "uint32", "U32", 12, "UINT32"
    INT16 = "int16", "I16", 5, "INT16"
    UINT16 = "uint16", "U16", 4, "UINT16"
    INT8 = "int8", "I8", 3, "INT8"
    UINT8 = "uint8", "U8", 2, "UINT8"
    BOOL = "bool", "BOOL", 9, "BOOL"

    safetensors: str
    onnx: int
    tensorrt: str
    short: str

    # With defaults for type checkers, which take Dtype("float32") for a call of this.
    def __new__(cls, value: str, safetensors: str = "", onnx: int = 0, tensorrt: str = "", short: str = "") -> Dtype:
        member = object.__new__(cls)
        member._value_ = value
        member.safetensors, member.onnx, member.tensorrt, member.short = safetensors, onnx, tensorrt, short
        return member

    @property
    def numpy(self) -> np.dtype[Any]:
        """Numpy's type; of those that numpy lacks, that of ``ml_dtypes``."""
        try:
            return np.dtype(self.value)
        except TypeError:
            import ml_dtypes

            return np.dtype(getattr(ml_dtypes, self.value))

    @property
    def torch(self) -> TorchDtype:
        """Torch's type."""
        import torch

        dtype: TorchDtype = getattr(torch, self.value)
        return dtype

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return self.numpy.itemsize

    @property
    def is_floating(self) -> bool:
        return "float" in self.value

    @classmethod
    def of_torch(cls, dtype: TorchDtype) -> Dtype:
        """Return torch's type; ValueError for one that is not among these."""
        return cls(str(dtype).removeprefix("torch."))


BY_SAFETENSORS = {dtype.safetensors: dtype for dtype in Dtype}
BY_ONNX = {dtype.onnx: dtype for dtype in Dtype}
PRECISIONS = {dtype.short: dtype for dtype in Dtype if dtype.short}
"""The types in which graphs are made, by the command line's names."""
