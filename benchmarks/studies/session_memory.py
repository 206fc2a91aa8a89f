"""Memory and speed of a bundle's sessions under ONNX Runtime on the CPU: weights shared, or prepacked by each.

    python -m benchmarks.studies.session_memory BUNDLE -o benchmarks/results/session-memory.json

Each way and each number of sessions has a process of its own, which loads graphs of the loop, runs each a few times,
and says what memory it took: PSS, in which a page that is mapped several times counts once. Prepacked, every session
holds all weights for itself, so one is enough to know. ``dipgo export --graphs step`` makes a bundle of many graphs.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.bench.environment import environment, load_average
from dipgo.base.child_process import python_environment
from dipgo.base.files import new_file
from engines.onnxrt.loader import session_from_graph
from export.axes import shape_at, values_at
from export.bundle import open_bundle

WAYS = {"shared": True, "prepacked": False}


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
            begun = time.perf_counter()
            session.run(None, feed)
            times.append(time.perf_counter() - begun)
        medians.append(statistics.median(times))
    return {
        "sessions": len(opened),
        "pss": {"before": before, "loaded": loaded, "after": process.memory_full_info().pss},
        "load_seconds": seconds,
        "run_seconds": medians,
    }


def main() -> None:
    """Measure both ways in processes of their own and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--sessions", type=int, default=8, help="how many at most")
    parser.add_argument("--runs", type=int, default=3, help="timed, after one that is not")
    parser.add_argument("--one", nargs=2, metavar=("WAY", "SESSIONS"), help="measure in this process and print")
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.bundle, WAYS[given.one[0]], int(given.one[1]), given.runs)))
        return
    load, rows = load_average(), []
    total = min(given.sessions, len(open_bundle(given.bundle).record.graphs))
    for way, shared in WAYS.items():
        for count in sorted({1, total if shared else 1}):
            command = [sys.executable, "-m", "benchmarks.studies.session_memory", given.bundle, "--runs", given.runs]
            command += ["--one", way, count]
            done = subprocess.run(
                [str(part) for part in command], env=python_environment(), check=True, capture_output=True, text=True
            )
            rows.append({"way": way} | json.loads(done.stdout.splitlines()[-1]))
            print(json.dumps(rows[-1]))
    record = {
        "command": shlex.join(["python", "-m", "benchmarks.studies.session_memory", *sys.argv[1:]]),
        "model": open_bundle(given.bundle, False).record.model.name,
        "rows": rows,
        "environment": environment(load).model_dump(),
    }
    if given.output:
        with new_file(given.output) as draft:
            draft.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
