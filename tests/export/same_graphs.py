"""Whether two bundles hold the same graphs, node for node, and the same program: for changes of the compiler.

    python -m tests.export.same_graphs OLD NEW

Prints each difference, and exits with 1 where there is one. Names inside a graph count, versions of libraries do not.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnx

CHANGING = ("versions", "sha256", "files")  # of the record: libraries, and what follows from them


def differences(old: Path, new: Path) -> list[str]:
    """Return what differs, a line each."""
    records = [json.loads((folder / "bundle.json").read_text()) for folder in (old, new)]
    lines = [f"bundle.json: {where}" for where in _differing(*({**r, **dict.fromkeys(CHANGING)} for r in records))]
    for name in sorted(records[0]["files"].keys() | records[1]["files"].keys()):
        if not all(name in record["files"] for record in records):
            lines.append(f"{name}: only in one of them")
        elif records[0]["files"][name] != records[1]["files"][name]:
            lines += _in_file(name, old / name, new / name)
    return lines


def _in_file(name: str, old: Path, new: Path) -> list[str]:
    if not name.endswith(".onnx"):
        return [f"{name}: another content"]
    first, second = (onnx.load(str(path), load_external_data=False).graph for path in (old, new))
    if len(first.node) != len(second.node):
        return [f"{name}: {len(first.node)} and {len(second.node)} nodes"]
    pairs = zip(first.node, second.node, strict=True)
    lines = [f"{name}: node {k}: {_text(a)} and {_text(b)}" for k, (a, b) in enumerate(pairs) if a != b]
    for what in ("input", "output", "initializer"):
        if _without_metadata(getattr(first, what)) != _without_metadata(getattr(second, what)):
            lines.append(f"{name}: another {what}")
    return lines


def _without_metadata(values: Iterable[Any]) -> list[Any]:
    for value in values:
        value.ClearField("metadata_props")
    return list(values)


def _differing(old: Any, new: Any, where: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
        return [line for key in old for line in _differing(old[key], new[key], f"{where}.{key}")]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [
            line for k, pair in enumerate(zip(old, new, strict=True)) for line in _differing(*pair, f"{where}[{k}]")
        ]
    return [] if old == new else [f"{where or '.'}: {str(old)[:80]} and {str(new)[:80]}"]


def _text(node: onnx.NodeProto) -> str:
    return f"{','.join(node.output)} = {node.op_type}({','.join(node.input)})"[:120]


if __name__ == "__main__":
    lines = differences(Path(sys.argv[1]), Path(sys.argv[2]))
    print("\n".join(lines) or "the same")
    sys.exit(bool(lines))
