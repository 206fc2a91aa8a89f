"""Whether two bundles hold the same graphs, node for node, and the same program: for changes of the compiler.

    python -m tests.export.same_graphs OLD NEW

Prints each difference, and exits with 1 where there is one. Names inside a graph count, versions of libraries do not.
"""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import onnx

from dipgo.base.files import sha256_of

CHANGING = ("versions", "sha256", "files")  # of the record: libraries, and what follows from them


def lines_of(file: Path) -> list[str]:
    """Return a file of a bundle as text; of graphs what they compute alone."""
    if file.suffix == ".onnx":
        graph = onnx.load(str(file), load_external_data=False).graph
        for value in (*graph.input, *graph.output, *graph.initializer, *graph.value_info, *graph.node):
            value.ClearField("metadata_props")
        return onnx.printer.to_text(graph).splitlines()
    if file.name == "bundle.json":
        record = json.loads(file.read_text())
        return json.dumps({name: record[name] for name in record if name not in CHANGING}, indent=1).splitlines()
    return [sha256_of(file)]


def differences(old: Path, new: Path) -> Iterator[str]:
    """Return what differs, a line each."""
    for name in sorted({str(path.relative_to(folder)) for folder in (old, new) for path in folder.rglob("*.*")}):
        if not ((old / name).exists() and (new / name).exists()):
            yield f"{name}: only in one of them"
            continue
        lines = difflib.unified_diff(lines_of(old / name), lines_of(new / name), n=0, lineterm="")
        yield from (f"{name}: {line[:120]}" for line in list(lines)[2:])


if __name__ == "__main__":
    found = list(differences(Path(sys.argv[1]), Path(sys.argv[2])))
    print("\n".join(found) or "the same")
    sys.exit(bool(found))
