"""Memory and speed of a bundle's sessions under ONNX Runtime on the CPU: weights shared, or prepacked by each.

    python -m benchmarks.studies.session_memory BUNDLE -o benchmarks/results/session-memory.json

Each way and each number of sessions has a process of its own, which loads graphs of the loop, runs each a few times,
and says what memory it took: PSS, in which a page that is mapped several times counts once. Prepacked, every session
holds all weights for itself, so one is enough to know. ``dipgo export --graphs step`` makes a bundle of many graphs.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.studies.study import Study, StudyRecord, Words, run
from engines.onnxrt.loader import session_from_graph
from export.axes import shape_at, values_at
from export.bundle import open_bundle

WAYS = {"shared": True, "prepacked": False}


class SessionMemory(StudyRecord):
    """The result file; a row a way and number of sessions, see :func:`measure`."""

    model: str
    rows: list[dict[str, Any]]


def measure(folder: Path, share: bool, sessions: int, runs: int) -> dict[str, Any]:
    """Load the first ``sessions`` graphs of the loop in this process and time ``runs`` runs of each on zeros.

    Returns:
        PSS in bytes before, loaded, and after the runs; seconds to load, and the median seconds of a run by graph.
    """
    bundle = open_bundle(folder, check_files=False)
    sizes = values_at(bundle.record.axes, "opt")
    graphs = list(bundle.record.graphs.values())[:sessions]
    process = psutil.Process()
    before = process.memory_full_info().pss
    started = time.perf_counter()
    opened = [session_from_graph(folder / graph.file, None, share) for graph in graphs]
    seconds = time.perf_counter() - started
    loaded = process.memory_full_info().pss
    medians = []
    for graph, session in zip(graphs, opened, strict=True):
        feed = {tensor.name: np.zeros(shape_at(tensor.shape, sizes), tensor.dtype) for tensor in graph.inputs}
        session.run(None, feed)  # the first one touches the weights
        times = []
        for _ in range(runs):
            began = time.perf_counter()
            session.run(None, feed)
            times.append(time.perf_counter() - began)
        medians.append(statistics.median(times))
    return {
        "sessions": len(opened),
        "pss": {"before": before, "loaded": loaded, "after": process.memory_full_info().pss},
        "load_seconds": seconds,
        "run_seconds": medians,
    }


def main(words: Words | None = None) -> None:
    """Measure both ways in processes of their own."""
    study = Study("session_memory", __doc__, words, required=False)
    study.parser.add_argument("bundle", type=Path)
    study.parser.add_argument("--sessions", type=int, default=8, help="how many at most")
    study.parser.add_argument("--runs", type=int, default=3, help="timed, after one that is not")
    study.parser.add_argument("--one", nargs=2, metavar=("WAY", "SESSIONS"), help="measure in this process and print")
    options = study.options()
    bundle: Path = options.bundle
    if options.one:
        way, sessions = options.one
        print(json.dumps(measure(bundle, WAYS[way], int(sessions), options.runs)))
        return
    record, rows = open_bundle(bundle).record, []
    total = min(options.sessions, len(record.graphs))
    for way, shared in WAYS.items():
        for count in sorted({1, total if shared else 1}):
            rows.append({"way": way} | study.alone(bundle, "--runs", options.runs, "--one", way, count))
            print(json.dumps(rows[-1]))
    study.write(SessionMemory(model=record.model.name, rows=rows, **study.origin()))


if __name__ == "__main__":
    run(main)
