"""A graph as a page, drawn by Polygraphy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.debug.differences import require_polygraphy
from dipgo.base.config import unknown
from dipgo.base.errors import DipgoError, UsageError
from dipgo.base.files import new_file, refuse_unless_new
from export.bundle import open_bundle

_TOOL = "from polygraphy.tools import main; main()"


def draw(folder: Path, page: Path, graph: str | None = None) -> str:
    """Write a page with a graph of a bundle, and return the graph's file; None is the one of the most MACs.

    The page loads the scripts that draw it from the web when it is looked at.

    Raises:
        UsageError: no such graph, or a page that is there already.
        DipgoError: Polygraphy is not installed, or draws nothing.
    """
    refuse_unless_new(page)
    require_polygraphy()
    record = open_bundle(folder).record
    file = graph or max(record.graphs.values(), key=lambda each: each.macs).file
    if file not in record.tensors:
        raise UsageError(unknown("graph", file, record.tensors))
    with new_file(page, force=False) as draft:
        draft.unlink()
        command = [sys.executable, "-c", _TOOL, "inspect", "model", str(folder / file), "--visual", "--save-visual"]
        done = subprocess.run([*command, str(draft)], capture_output=True, text=True, check=False)
        if done.returncode or not draft.is_file():
            lines = (done.stderr or done.stdout).strip().splitlines() or ["it gives no reason"]
            raise DipgoError(f"{folder / file}: Polygraphy draws no page of it ({lines[-1][:200]})")
    return file
