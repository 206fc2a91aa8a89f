"""Constants of graphs that are no weights (position embeddings, folded rows of tables), once in one file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from safetensors.numpy import save_file

from dipgo.base.safetensors_index import read_file
from export.onnx.macs import CONSTANTS as FILE

_SMALL = 1024  # bytes; less stays in the graph


@contextmanager
def outside(models: Iterable[ir.Model], folder: Path) -> Iterator[None]:
    """Within the context, the large constants of graphs lie in ``folder``'s file, equal ones once.

    Tensors are named by their digest. There is no file where there are no such constants. Afterwards the graphs hold
    their constants again, so that they can be written into another folder.
    """
    places: dict[str, list[ir.Value]] = {}
    contents: dict[str, np.ndarray] = {}
    inside: dict[ir.Value, Any] = {}
    for model in models:
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None or isinstance(tensor, ir.ExternalTensor) or tensor.nbytes < _SMALL:
                continue
            data = np.frombuffer(tensor.tobytes(), np.uint8)
            key = hashlib.sha256(f"{tensor.dtype.name}{list(tensor.shape)}".encode() + data.tobytes()).hexdigest()[:32]
            contents[key] = data
            places.setdefault(key, []).append(value)
            inside[value] = tensor
    if contents:
        save_file(dict(sorted(contents.items())), folder / FILE)
        stored = read_file(folder / FILE)
        for key, values in places.items():
            for value in values:
                tensor, at, name = inside[value], stored[key], value.name or key
                value.const_value = ir.ExternalTensor(
                    FILE, at.offset, at.length, tensor.dtype, shape=tensor.shape, name=name, base_dir=folder
                )
    try:
        yield
    finally:
        for value, tensor in inside.items():
            value.const_value = tensor
