"""Weights of a bundle as torch tensors: each once, however many graphs point to it."""

from __future__ import annotations

from math import prod
from pathlib import Path

import onnx_ir as ir
import torch

from dipgo.base.dtypes import BY_ONNX
from dipgo.base.errors import DipgoError


class Weights:
    """Tensors by where they lie: mapped from their files on the CPU, copied once to any other device."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder, self.device = folder, device
        self._files: dict[str, torch.Tensor] = {}
        self._tensors: dict[tuple[str, int, torch.dtype, tuple[int, ...]], torch.Tensor] = {}

    def find(self, external: ir.ExternalTensor) -> torch.Tensor:
        """Return a tensor, the same one every time.

        Raises:
            DipgoError: a file outside the bundle, or a tensor that does not fit into its file.
        """
        location, offset, shape = str(external.location), external.offset or 0, tuple(external.shape.numpy())
        if int(external.dtype) not in BY_ONNX:
            raise DipgoError(
                f"{self.folder / location}: torch takes no weights of type {external.dtype}; export it again"
            )
        dtype = BY_ONNX[int(external.dtype)].torch
        key = (location, offset, dtype, shape)
        if key not in self._tensors:
            size = prod(shape) * dtype.itemsize
            content = self._file(location)
            if external.length not in (None, size) or offset + size > len(content):
                raise DipgoError(f"{self.folder / location}: '{external.name}' lies outside the file; export it again")
            part = content[offset : offset + size]
            if offset % dtype.itemsize:
                part = part.clone()  # torch reads no tensors across the boundaries of its elements
            self._tensors[key] = part.view(dtype).reshape(shape).to(self.device)
        return self._tensors[key]

    def _file(self, location: str) -> torch.Tensor:
        """Map a file as bytes; a page that is never read takes no memory."""
        if location not in self._files:
            path = self.folder / location
            if not path.resolve().is_relative_to(self.folder.resolve()) or not path.is_file():
                raise DipgoError(f"{path}: no weights file of this bundle; export it again")
            size = path.stat().st_size
            self._files[location] = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        return self._files[location]
