"""Checkpoints: what safetensors files hold and where, read from their headers alone; nothing in them is trusted."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from dipgo.base.dtypes import BY_SAFETENSORS, Dtype
from dipgo.base.errors import DipgoError
from dipgo.base.inputs import open_input, parse_json, read_json

if TYPE_CHECKING:  # headers are read without torch
    import torch

ALIGNMENT = 64  # of the data in files that dipgo writes, for vector loads from mapped memory
_SHARD = re.compile(r"-\d+-of-\d+")
_HEADER_LIMIT = 25_000_000  # as the hub has it
_PIECE = 2**24  # bytes in memory at a time; a multiple of every element's size


@dataclass(frozen=True)
class Stored:
    """Where a tensor's bytes lie.

    Attributes:
        file: the safetensors file as found, maybe a symbolic link of a hub cache.
        offset: where the bytes start, from the start of the file.
        length: how many there are.
        shape: its sizes.
    """

    file: Path
    offset: int
    length: int
    dtype: Dtype
    shape: tuple[int, ...]


def checkpoint_files(folder: Path, stem: str, variant: str | None = None) -> list[Path]:
    """Return the safetensors files of a component, in order of name; none where there are none.

    ``stem`` is ``diffusion_pytorch_model`` or ``model``, as diffusers and transformers name them. Shards are taken
    where an index stands beside them. Files of ``variant`` (``fp16`` for ``.fp16.``) come first, as in diffusers; those
    of others are left out where there is a checkpoint without a suffix.
    """
    found = sorted(folder.glob(f"{stem}*.safetensors"))
    if not found:
        return []
    whole_names = [_SHARD.sub("", path.name) for path in found]
    wanted = f"{stem}.{variant}.safetensors"
    name = wanted if wanted in whole_names else min(whole_names, key=lambda name: (len(name), name))
    files = [path for path, whole in zip(found, whole_names, strict=True) if whole == name]
    shards = [path for path in files if path.name != name]
    indexed = folder.joinpath(f"{name}.index.json").is_file()
    return shards if shards and (indexed or len(shards) == len(files)) else files[-1:]


def variant_of(files: Sequence[Path]) -> str | None:
    """Return what diffusers calls the variant of a component's files, ``fp16`` in ``….fp16.safetensors``, or None."""
    parts = _SHARD.sub("", files[0].name).split(".")[1:-1] if files else []
    return parts[0] if parts else None


def stored_tensors(files: Sequence[Path]) -> dict[str, Stored]:
    """Return where each tensor of a checkpoint lies, of one file or of all its shards; only headers are read.

    Raises:
        DipgoError: a file that is missing, truncated or damaged, a tensor in two files, or a shard that the index
            beside the files names and that is not among them.
    """
    checkpoint: dict[str, Stored] = {}
    for file in files:
        for name, stored in read_file(file).items():
            if name in checkpoint:
                raise DipgoError(
                    f"{file}: holds {name!r}, which {checkpoint[name].file.name} holds too; keep the files of one "
                    "checkpoint in the folder"
                )
            checkpoint[name] = stored
    _check_indexes(files, checkpoint)
    return checkpoint


def safetensors_header(tensors: Mapping[str, tuple[Dtype, Sequence[int]]]) -> bytes:
    """Return how a safetensors file starts, given ``{name: (dtype, shape)}`` in the order in which the data follow.

    It is padded so that the data start at a multiple of :data:`ALIGNMENT`.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers refuses files that do not say so
    start = 0
    for name, (dtype, shape) in tensors.items():
        end = start + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": dtype.safetensors, "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def read_file(file: Path) -> dict[str, Stored]:
    """Return where the tensors of one file lie, having checked that they fill it exactly."""
    try:
        with open_input(file, "safetensors file", None) as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > size - 8:
                raise _damaged(file, f"a header of {length} bytes in a file of {size}")
            if length > _HEADER_LIMIT:
                raise _damaged(file, f"a header of {length} bytes, above {_HEADER_LIMIT}")
            text = stream.read(length).decode()
            header = parse_json(text)
    except OSError as error:
        raise _damaged(file, error.strerror or "cannot be read") from error
    except ValueError as error:
        raise _damaged(file, "its header is not JSON") from error
    metadata = header.pop("__metadata__", {}) if isinstance(header, dict) and text.startswith("{") else None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(file, "its header is not a JSON object of tensors")
    start = 8 + length
    tensors = {name: _entry(file, start, name, entry) for name, entry in header.items()}
    end = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].length)):
        if tensor.offset != end:
            raise _damaged(
                file, f"{name!r} {'overlaps' if tensor.offset < end else 'leaves a gap after'} another tensor"
            )
        end += tensor.length
    if end != size:
        raise _damaged(file, f"its tensors end at byte {end}, the file at {size}")
    return tensors


def is_whole(file: Path, expected: Mapping[str, tuple[Dtype, tuple[int, ...]]]) -> bool:
    """Whether a file is there, undamaged, and holds these tensors, ``{name: (dtype, shape)}``, and no others."""
    try:
        return {name: (stored.dtype, stored.shape) for name, stored in read_file(file).items()} == expected
    except DipgoError:
        return False


def read_pieces(stored: Stored) -> Iterator[torch.Tensor]:
    """Yield a tensor's values, flat, at most 16 MiB at a time."""
    import torch

    with stored.file.open("rb") as stream:
        stream.seek(stored.offset)
        for start in range(0, stored.length, _PIECE):
            buffer = bytearray(min(_PIECE, stored.length - start))
            if stream.readinto(buffer) != len(buffer):
                raise _damaged(stored.file, "it became shorter while it was read")
            yield torch.frombuffer(buffer, dtype=stored.dtype.torch)


def _entry(file: Path, start: int, name: str, entry: Any) -> Stored:
    """Return one entry of a header, having checked it alone."""
    fields = entry if isinstance(entry, dict) else {}
    kind, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(kind, str) or not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise _damaged(file, f"{name!r} has no dtype, shape and offsets")
    dtype = BY_SAFETENSORS.get(kind)
    if dtype is None:
        raise DipgoError(
            f"{file}: {name!r} is of the type {kind[:20]!r}, which ONNX graphs cannot point to; save it in float32"
        )
    first, last = offsets
    if len(shape) > 64 or math.prod(shape) * dtype.itemsize != last - first:
        raise _damaged(file, f"{name!r} has offsets that do not match {dtype.safetensors} {shape[:8]}")
    return Stored(file, start + first, last - first, dtype, tuple(shape))


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)


def _damaged(file: Path, detail: str) -> DipgoError:
    return DipgoError(f"{file}: truncated or damaged ({detail[:160]}); download or save it again")


def _check_indexes(files: Sequence[Path], checkpoint: Mapping[str, Stored]) -> None:
    """Check that the shards and tensors of the indexes beside the files are there; other variants' do not count."""
    for index in sorted({path for file in files for path in file.parent.glob("*.safetensors.index*.json")}):
        content = read_json(index, "index of shards")
        entries = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(entries, dict) or not all(isinstance(shard, str) for shard in entries.values()):
            raise DipgoError(f"{index}: not an index of shards (no 'weight_map'); download or save it again")
        shards = {file.name for file in files if file.parent == index.parent}
        if shards.isdisjoint(entries.values()):
            continue
        for name, shard in entries.items():
            if shard not in shards:
                raise DipgoError(f"{index}: names the shard {shard!r}, which is missing; download or save it again")
            if name not in checkpoint or checkpoint[name].file.name != shard:
                raise DipgoError(f"{index}: {name!r} is not in {shard!r}; download or save both again")
