"""Converted models on disk, so that the same program is converted once: ``$XDG_CACHE_HOME/dipgo/converted``.

A file is found by a digest of all that the graph follows from (:func:`digest_of_program`, and what is done with it),
and of the code that makes it. Weights are never in it. It is ONNX's protobuf behind its own SHA-256: what is damaged
counts as not there. ``DIPGO_CONVERSION_CACHE=off`` switches it off.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from dipgo.base.errors import DipgoError
from dipgo.base.files import cache_root, new_file, sha256_of, sha256_of_json

LIMIT = 2**30  # bytes of all files; the longest unused go first
SWITCH = "DIPGO_CONVERSION_CACHE"
_PACKAGES = ("torch", "onnx", "onnxscript", "onnx-ir", "numpy", "sympy")
_DIGEST = hashlib.sha256().digest_size


def cached(parts: list[Any], make: Callable[[], ir.Model]) -> ir.Model:
    """Return what ``make`` returns for ``parts``, a JSON value that decides it: from the disk, if it was made before.

    Metadata and documentation are not kept.
    """
    if os.environ.get(SWITCH, "").lower() in ("off", "0", "no", "false"):
        return make()
    path = folder() / f"{sha256_of_json([*parts, _code()])}.onnx"
    model = _read(path)
    if model is not None:
        return model
    content = ir.to_proto(make()).SerializeToString()
    with suppress(DipgoError, OSError):  # a folder that takes no files: it is made again the next time
        with new_file(path) as draft:
            draft.write_bytes(hashlib.sha256(content).digest() + content)
        _discard_oldest(path.parent)
    return _parsed(content)


def folder() -> Path:
    return cache_root() / "converted"


def digest_of_program(program: ExportedProgram) -> str:
    """Return a digest of an exported program: nodes, shapes, names and constants, but not the values of parameters."""
    hasher = hashlib.sha256(f"{program.graph_signature}{program.range_constraints}".encode())
    for name, module in program.graph_module.named_modules():
        if isinstance(module, GraphModule):
            hasher.update(f"{name}{module.graph}".encode())
            for node in module.graph.nodes:
                hasher.update(f"{node.name}{pytree.tree_map(_described, node.meta.get('val'))}".encode())
    parameters = set(program.graph_signature.parameters)
    tensors = {name: value for name, value in program.state_dict.items() if name not in parameters}
    for name, value in sorted((tensors | program.constants).items()):
        hasher.update(f"{name}{_described(value)}".encode())
        if isinstance(value, torch.Tensor):
            hasher.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def _described(value: Any) -> str:
    return f"{value.dtype}{list(value.shape)}" if isinstance(value, torch.Tensor) else str(value)


@cache
def _code() -> list[str]:
    """Return versions and digests of the code that turns a program into a graph."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return [*(version(name) for name in _PACKAGES), *(sha256_of(source) for source in sources)]


def _read(path: Path) -> ir.Model | None:
    """Return a model that is there and whole."""
    try:
        content = path.read_bytes()
        if hashlib.sha256(content[_DIGEST:]).digest() != content[:_DIGEST]:
            return None
        os.utime(path)  # it is in use
    except OSError:
        return None
    return _parsed(content[_DIGEST:])


def _parsed(content: bytes) -> ir.Model:
    return ir.from_proto(onnx.ModelProto.FromString(content))


def _discard_oldest(parent: Path) -> None:
    """Remove files until those that stay fit into :data:`LIMIT`."""
    files = []
    for path in parent.iterdir():
        with suppress(FileNotFoundError):  # another process does the same
            files.append((path.stat().st_mtime, path.stat().st_size, path))
    total = 0
    for _, size, path in sorted(files, reverse=True):
        total += size
        if total > LIMIT:
            path.unlink(missing_ok=True)
