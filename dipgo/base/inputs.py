"""Files that are handed in, and may be anything: only regular files of limited size are read.

Everything that a user names, or that lies in a folder that a user names, is opened here.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from dipgo.base.errors import DipgoError

if TYPE_CHECKING:
    import numpy as np

LARGEST = 16 * 2**20  # bytes of a file, unless its reader says otherwise; records of large models have under 1 MB
LARGEST_TENSORS = 2**30
LARGEST_YAML = 2**16  # PyYAML takes a second for it
DEEPEST = 64  # objects and lists within each other
_DEEP = f"nested more than {DEEPEST} levels deep"
_FLOATS = ("F64", "F32", "F16")


def open_input(path: Path, what: str, largest: int | None = LARGEST) -> BinaryIO:
    """Open a file for reading; ``what`` it is to be is for messages, ``largest`` None allows any size.

    Raises:
        DipgoError: no such file, one that is not regular (a device, a pipe, a folder), or a larger one.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe is not waited for
    except FileNotFoundError as error:
        raise DipgoError(f"{path}: no such {what}") from error
    except (OSError, ValueError) as error:  # the second for a name that holds NUL
        raise DipgoError(f"{path}: not a readable {what} ({getattr(error, 'strerror', error)})") from error
    status = os.fstat(handle)
    if stat.S_ISREG(status.st_mode) and (largest is None or status.st_size <= largest):
        return os.fdopen(handle, "rb")
    os.close(handle)
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
        raise DipgoError(f"{path}: not a readable {what} ({kind}, not a file); give a regular file")
    raise _too_large(path, what, largest or 0)


def read_input(path: Path, what: str, largest: int = LARGEST) -> bytes:
    """Return the content of a file; see :func:`open_input`."""
    try:
        with open_input(path, what, largest) as stream:
            content = stream.read(largest + 1) or b""  # files of the system may say that they are empty
    except OSError as error:
        raise DipgoError(f"{path}: not a readable {what} ({error.strerror})") from error
    if len(content) > largest:
        raise _too_large(path, what, largest)
    return content


def read_text(path: Path, what: str, largest: int = LARGEST) -> str:
    """Return a text file's content, UTF-8 with or without a byte order mark; see :func:`open_input`."""
    try:
        return read_input(path, what, largest).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DipgoError(
            f"{path}: not a readable {what} (not UTF-8 at byte {error.start}); save it as UTF-8 text"
        ) from error


def read_json(path: Path, what: str, largest: int = LARGEST) -> Any:
    """Return the value in a JSON file, or say in one line why not; see :func:`open_input`."""
    return _parsed(parse_json, read_text(path, what, largest), path, what)


def read_yaml(path: Path, what: str) -> Any:
    """Return the value in a YAML file of settings, or say in one line why not; see :func:`open_input`."""
    return _parsed(parse_yaml, read_text(path, what, LARGEST_YAML), path, what)


def parse_json(text: str) -> Any:
    """Return a JSON value.

    Raises:
        ValueError: no JSON, or values nested deeper than :data:`DEEPEST`, which no reader of ours needs.
    """
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError(_DEEP) from error
    level, depth = [value], 0
    while level := [inner for outer in level for inner in _inner(outer)]:
        depth += 1
        if depth > DEEPEST:
            raise ValueError(_DEEP)
    return value


def parse_yaml(text: str) -> Any:
    """Return a YAML value of plain types; every value stands where it is written, so that none holds itself.

    Raises:
        ValueError: no YAML, an alias in it, or values nested too deeply.
    """
    import yaml  # type: ignore[import-untyped]

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise ValueError("it has aliases (*name); write their values out")
            return super().compose_node(parent, index)

    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    except RecursionError as error:
        raise ValueError(_DEEP) from error


def read_tensors(path: Path, what: str, cure: str, largest: int = LARGEST_TENSORS) -> dict[str, np.ndarray]:
    """Return all tensors of a safetensors file of real numbers in types that numpy has, by name.

    Raises:
        DipgoError: see :func:`open_input`; a damaged file, or another type.
    """
    from safetensors import SafetensorError, safe_open

    open_input(path, what, largest).close()
    try:
        with safe_open(path, "np") as file:
            kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - no mapping
            for name, kind in kinds.items():
                if kind not in _FLOATS:
                    raise DipgoError(f"{path}: '{name}' is of the type {kind}, not one of {', '.join(_FLOATS)}; {cure}")
            return {name: file.get_tensor(name) for name in kinds}
    except (SafetensorError, OSError, ValueError) as error:  # the last for a shape that numpy cannot have
        raise DipgoError(f"{path}: not a safetensors file ({error}); {cure}") from error


def _parsed(parse: Callable[[str], Any], text: str, path: Path, what: str) -> Any:
    try:
        return parse(text)
    except ValueError as error:
        raise DipgoError(f"{path}: not a readable {what} ({error})") from error


def _inner(value: Any) -> Any:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _too_large(path: Path, what: str, largest: int) -> DipgoError:
    return DipgoError(f"{path}: larger than any {what} ({largest / 2**20:g} MB at most); is it the right file?")
