"""Weights where they lie: graphs point into safetensors files, whose values are never loaded here.

A bundle has its weights files at the paths that they have in the diffusers pipeline folder (``unet/…safetensors``), so
the pipeline folder can be the bundle folder itself.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch

from dipgo.base.dtypes import Dtype
from dipgo.base.errors import DipgoError
from dipgo.base.files import new_file, sha256_of_json, sha256_once
from dipgo.base.safetensors_index import Stored, is_whole, read_pieces, safetensors_header, stored_tensors


@dataclass(frozen=True)
class Weights:
    """Where a component's tensors lie.

    Attributes:
        tensors: by their names in the checkpoint.
        root: the folder that holds the files, to which the graphs' paths are relative.
    """

    tensors: Mapping[str, Stored]
    root: Path

    @property
    def files(self) -> list[Path]:
        """The files that hold them, in order of name."""
        return sorted({stored.file for stored in self.tensors.values()})


def bind(model: ir.Model, names: Mapping[str, str], checkpoint: Mapping[str, Stored], root: Path) -> None:
    """Point the initializers of a graph at their bytes, by paths relative to ``root``.

    ``names`` maps initializers to tensors of the checkpoint; those that the graph does not hold are passed over.

    Raises:
        DipgoError: a tensor that is missing, that has another shape or dtype than the graph wants, or that lies
            outside ``root``.
    """
    for initializer, name in names.items():
        value = model.graph.initializers.get(initializer)
        if value is None:
            continue
        stored = _find(checkpoint, name)
        expected = value.const_value if value.const_value is not None else value
        assert expected.shape is not None
        assert expected.dtype is not None
        if tuple(expected.shape) != stored.shape or expected.dtype != ir.DataType(stored.dtype.onnx):
            raise DipgoError(
                f"{stored.file}: '{name}' is {stored.dtype.safetensors} {list(stored.shape)}, the graph wants "
                f"{expected.dtype.name} {list(expected.shape)}; use the checkpoint of this model, in the precision of "
                "the graph"
            )
        value.const_value = _Bytes(stored, initializer, _relative(stored.file, root))
        value.shape, value.type = value.const_value.shape, ir.TensorType(value.const_value.dtype)


class _Bytes(ir.ExternalTensor):
    """External data that may be read through a symbolic link, as a hub cache has them.

    onnx_ir refuses links that lead out of the base folder, which protects those who open a model of others. Here the
    file is the user's own.
    """

    __slots__ = ("_file",)

    def __init__(self, stored: Stored, name: str, location: str) -> None:
        self._file = stored.file
        dtype, shape = ir.DataType(stored.dtype.onnx), ir.Shape(stored.shape)
        super().__init__(location, stored.offset, stored.length, dtype, shape=shape, name=name, base_dir="")

    @property
    def path(self) -> str:
        return str(self._file)


def cast(
    checkpoint: Mapping[str, Stored],
    names: Sequence[str],
    dtype: Dtype,
    folder: Path,
    component: str,
) -> dict[str, Stored]:
    """Write the named tensors into one safetensors file, floating-point ones as ``dtype``, and return where they lie.

    The file is ``folder/component/<dtype>-<digest>.safetensors``; the digest is of the sources, the names and the
    dtype, so a file that is there and whole is used again. Values are rounded as :meth:`torch.Tensor.to` does.

    Raises:
        DipgoError: a missing tensor, a value that float16 cannot hold, or a full disk.
    """
    stored = {name: _find(checkpoint, name) for name in names}
    sources = sorted({tensor.file for tensor in stored.values()})
    digest = sha256_of_json([dtype.safetensors, sorted(stored), sorted(sha256_once(source) for source in sources)])
    target = folder / component / f"{dtype.safetensors}-{digest[:12]}.safetensors"
    kinds = {name: dtype if tensor.dtype.is_floating else tensor.dtype for name, tensor in stored.items()}
    # The widest elements first, so that every tensor is aligned to its elements.
    order = sorted(stored, key=lambda name: (-kinds[name].itemsize, name))
    if not is_whole(target, {name: (kinds[name], stored[name].shape) for name in order}):
        with new_file(target) as draft, draft.open("wb") as stream:
            stream.write(safetensors_header({name: (kinds[name], stored[name].shape) for name in order}))
            for name in order:
                for piece in read_pieces(stored[name]):
                    stream.write(_converted(piece, kinds[name], stored[name].file, name).view(torch.uint8).numpy().data)
    return stored_tensors([target])


def place(files: Iterable[Path], root: Path, folder: Path, digests: Mapping[Path, str] | None = None) -> dict[str, str]:
    """Copy weights files to the paths under ``folder`` that they have under ``root``; return SHA-256 by such path.

    Links are followed, the copies are plain files. They share their blocks with the originals where the file system
    can. ``digests`` are those known already.

    Raises:
        DipgoError: a file outside ``root``, or a full disk.
    """
    by_path = {}
    for file in files:
        location = _relative(file, root)
        with new_file(folder / location) as draft:
            _copy(file, draft)
        by_path[location] = (digests or {}).get(file) or sha256_once(file)
    return by_path


def check_in_place(files: Iterable[Path], root: Path) -> None:
    """Check that ONNX tools will follow graphs in ``root`` to the weights files: no links, nothing outside.

    Raises:
        DipgoError: the first file that they would refuse.
    """
    for file in files:
        path = Path(os.path.abspath(root))
        for part in Path(_relative(file, root, "export with --weights copy")).parts:
            path /= part
            if path.is_symlink():
                raise DipgoError(
                    f"{path}: ONNX tools refuse weights behind a symbolic link; export with --weights copy"
                )
        if path.stat().st_nlink > 1:
            raise DipgoError(f"{path}: ONNX tools refuse a file with several hard links; export with --weights copy")


def _find(checkpoint: Mapping[str, Stored], name: str) -> Stored:
    if name not in checkpoint:
        files = sorted({stored.file for stored in checkpoint.values()})
        where = files[0] if len(files) == 1 else files[0].parent if files else "the checkpoint"
        raise DipgoError(f"{where}: holds no tensor '{name}'; it belongs to another model")
    return checkpoint[name]


def _relative(file: Path, root: Path, cure: str = "keep the whole pipeline in one folder") -> str:
    """Return the path below ``root`` as ONNX writes it; links are not resolved."""
    try:
        return Path(os.path.abspath(file)).relative_to(os.path.abspath(root)).as_posix()
    except ValueError as error:
        raise DipgoError(f"{file}: lies outside {root}; {cure}") from error


def _converted(values: torch.Tensor, dtype: Dtype, file: Path, name: str) -> torch.Tensor:
    """Return values in another type; refuse finite ones that become infinite."""
    if values.dtype == dtype.torch:
        return values
    converted = values.to(dtype.torch)
    infinite = converted.isinf()
    if infinite.any() and values.double()[infinite].isfinite().any():
        cure = "bf16 or fp32" if dtype is Dtype.FLOAT16 else "fp32"
        raise DipgoError(f"{file}: '{name}' holds values too large for {dtype.safetensors}; export in {cure}")
    return converted


def _copy(source: Path, target: Path) -> None:
    """Copy a file, by sharing its blocks where the file system can."""
    try:
        with source.open("rb") as reader, target.open("wb") as writer:
            while os.copy_file_range(reader.fileno(), writer.fileno(), 2**30):
                pass
    except (AttributeError, OSError):  # Linux alone has it, and not between all file systems
        shutil.copyfile(source, target)
