"""Random changes of files: of JSON by its structure, of safetensors by their header, of bytes, of folders by links."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from pydantic import ValidationError

from export.records.bundle import BundleRecord

VALUES: list[Callable[[Random], Any]] = [
    lambda rng: rng.choice([None, True, False, "", [], {}]),
    lambda rng: rng.choice([-1, 0, 1, 2, 3, 7, 64, 10_000, 2**31, 2**63, 2**64, -(2**63), 10**40, 10**400]),
    lambda rng: rng.choice([0.5, -1.0, 1e30, 1e308, float("nan"), float("inf"), float("-inf"), 5e-324]),
    lambda rng: rng.choice(
        ["\x1b[31mred\r\n", "../../secret", "/etc/passwd", "\0", "ü" * 300, "a" * 100_000, "\ud800"]
    ),
    lambda rng: rng.choice(["batch", "2*batch", "height-9", "0*width", "batch//0", "9**9", "-height", "(" * 99, "x"]),
    lambda rng: rng.choice(
        ["float64", "bfloat16", "float8_e4m3fn", "int64", "bool", "string", "BF16", "class", "host"]
    ),
    lambda rng: nested(rng.choice([3, 70, 300]), rng.choice("[{")),
    lambda rng: [rng.randrange(-2, 9) for _ in range(rng.randrange(10))],
    lambda rng: [0] * rng.choice([100, 3000, 100_000]),
]
DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F4", "I64", "U8", "BOOL", "C64", "")


def nested(depth: int, kind: str) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value] if kind == "[" else {"a": value}
    return value


def change_json(rng: Random, document: Any) -> Any:
    """Return a document with a value replaced, deleted, doubled, moved, or swapped with another."""
    document = copy.deepcopy(document)
    places = _places(rng, document)
    if not places:
        return rng.choice(VALUES)(rng)
    parent, key = rng.choice(places)
    match rng.randrange(7):
        case 0 | 1:
            parent[key] = rng.choice(VALUES)(rng)
        case 2:
            del parent[key]
        case 3 if isinstance(parent[key], int | float) and not isinstance(parent[key], bool):
            parent[key] += rng.choice([-1, 1, 1e-3, 10]) if abs(parent[key]) < 2**53 else 1
        case 4 if isinstance(parent, list):
            parent.insert(rng.randrange(len(parent) + 1), copy.deepcopy(parent[key]))
        case 4:
            parent[rng.choice(["new", "\x1b[2J", *parent])] = copy.deepcopy(parent[key])
        case _:
            other, place = rng.choice(places if rng.random() < 0.5 else [(parent, key) for key in _keys(parent)])
            parent[key], other[place] = copy.deepcopy(other[place]), copy.deepcopy(parent[key])
    return document


def _keys(value: Any) -> list[Any]:
    return list(value) if isinstance(value, dict) else list(range(len(value)))


def _places(rng: Random, document: Any) -> list[tuple[Any, Any]]:
    """Return places of values: all of them, or those on one way from the top, so that few are not lost in many."""
    if rng.random() < 0.5:
        places, value = [], document
        while isinstance(value, dict | list) and value:
            key = rng.choice(_keys(value))
            places.append((value, key))
            value = value[key]
        return places
    places, left = [], [document]
    while left:
        value = left.pop()
        if isinstance(value, dict | list):
            places += [(value, key) for key in _keys(value)]
            left += value.values() if isinstance(value, dict) else value
    return places


def change_document(rng: Random, data: bytes) -> bytes:
    """Return a JSON file with a few changes."""
    if rng.random() < 0.2:
        return change_bytes(rng, data)
    document = json.loads(data)
    for _ in range(rng.choice([1, 1, 2, 3])):
        document = change_json(rng, document)
    return json.dumps(document).encode()


def change_bytes(rng: Random, data: bytes) -> bytes:
    """Return data with bits flipped, parts cut out, doubled, zeroed, or put in."""
    at, length = rng.randrange(len(data) + 1), rng.choice([1, 2, 4, 8, 64, 1000])
    match rng.randrange(6):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + rng.randbytes(length) + data[at:]
        case 2:
            return data[:at] + data[at + length :]
        case 3:
            return data[:at] + bytes(length) + data[at + length :]
        case 4:
            return data[:at] + data[at : at + length] * rng.choice([2, 100]) + data[at + length :]
        case _:
            changed = bytearray(data)
            for _ in range(rng.choice([1, 1, 3, 20])):
                if changed:
                    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
            return bytes(changed)


def change_safetensors(rng: Random, data: bytes) -> bytes:
    """Return a safetensors file with another header, whose length fits, or other data."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    match rng.randrange(5):
        case 0:
            return change_bytes(rng, data)
        case 1 if names:
            header[rng.choice(names)]["dtype"] = rng.choice(DTYPES)
        case 2 if names:
            shape = header[rng.choice(names)]["shape"]
            rng.choice([shape.reverse, lambda: shape.append(1), shape.clear, lambda: shape.insert(0, 1)])()
        case 3 if names:
            header[rng.choice(["other", *names])] = header.pop(rng.choice(names))
        case _:
            header = change_json(rng, header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def change_file(rng: Random, path: Path) -> None:
    """Change a file as its kind suggests, or replace it by something that is no file of that kind."""
    if rng.random() < 0.15:
        replace(rng, path)
        return
    data = path.read_bytes()
    change = {".json": change_document, ".safetensors": change_safetensors}.get(path.suffix, change_bytes)
    try:
        path.write_bytes(change(rng, data))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):  # what an earlier change has spoilt
        path.write_bytes(change_bytes(rng, data))


def replace(rng: Random, path: Path) -> None:
    """Put a link, a pipe, a folder, a device, a sparse file, or another file in a file's place."""
    data = path.read_bytes()
    path.unlink()
    match rng.randrange(7):
        case 0:
            outside = path.parents[1] / f"outside-{path.name}"
            outside.write_bytes(data)
            path.symlink_to(outside)
        case 1:
            os.mkfifo(path)
        case 2:
            path.mkdir()
        case 3:
            path.symlink_to("/dev/zero")
        case 4:
            with path.open("wb") as stream:
                stream.truncate(50 * 2**30)
        case 5:
            others = [other for other in path.parent.iterdir() if other.is_file() and not other.is_symlink()]
            # None that an earlier change filled with 50 GB.
            others = [other for other in others if other.stat().st_size < 2**27]
            path.write_bytes(rng.choice(others).read_bytes() if others else b"")
        case _:
            path.symlink_to(path.name)  # itself


def reseal(folder: Path) -> None:
    """Make the checksums of a bundle fit, as somebody would who alters it on purpose; where it is still a record."""
    path = folder / "bundle.json"
    if not path.is_file() or path.stat().st_size > 2**24:
        return
    try:
        document = json.loads(path.read_text())
        for name, entry in document["files"].items():
            file = folder / name
            if file.is_file() and file.stat().st_size < 2**28:
                data = file.read_bytes()
                entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            elif file.is_file() and not file.is_symlink():
                entry["bytes"] = file.stat().st_size
        path.write_text(json.dumps(document))
        path.write_text(BundleRecord.model_validate(document).sealed().text())
    except (ValidationError, ValueError, TypeError, KeyError, AttributeError, OSError, RecursionError):
        return
