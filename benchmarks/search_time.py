"""How long a search takes on an idle machine, and what memory: one budget at a time, each in a process of its own.

    python -m benchmarks.search_time digits-dit --steps 20 --budgets 0.5,0.35 -o benchmarks/results/search-time.json

Nothing is told by the search alone: wall time is of the whole process, memory of the operating system.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from benchmarks.environment import Environment, environment, load_average
from dipgo.errors import DipgoError
from dipgo.files import new_file
from dipgo.records import Record
from dipgo.subnet import load_subnet


class SearchTime(Record):
    """One search at default settings.

    ``iterations`` are gradient steps of all phases. ``peak_bytes`` is the largest resident memory seen, looked at ten
    times a second. PSNR is on the noise that the search judges by.
    """

    budget: float
    seconds: float
    iterations: int
    peak_bytes: int
    held_out_psnr_db: float


class SearchTimes(Record):
    """The result file."""

    command: str
    model: str
    searches: list[SearchTime]
    environment: Environment


def measure(model: str, steps: int, budget: float, folder: Path) -> SearchTime:
    """Search once, in a process of its own.

    Raises:
        DipgoError: the search failed.
    """
    subnet, run = folder / "subnet.json", folder / "run"
    words = ["search", model, "--steps", steps, "--budget", budget, "--run-folder", run, "-o", subnet]
    begun, peak = time.perf_counter(), 0
    with (folder / "log").open("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "dipgo.cli", *map(str, words)], stdout=log, stderr=subprocess.STDOUT
        )
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                peak = max(peak, watched.memory_info().rss)
            except psutil.Error:
                break
            time.sleep(0.1)
        failed = process.wait()
        seconds = time.perf_counter() - begun
        if failed:
            log.seek(0)
            raise DipgoError(f"the search at {budget:g} failed: {log.read().strip().splitlines()[-1]}")
    record = load_subnet(subnet).search
    return SearchTime(
        budget=budget,
        seconds=round(seconds, 1),
        iterations=sum("loss" in json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()),
        peak_bytes=peak,
        held_out_psnr_db=record["held_out_psnr_db"][record["chosen"]],
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--budgets", default="0.5,0.35,0.25,0.2", help="joined by commas")
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args(arguments)
    load, searches = load_average(), []
    for budget in map(float, given.budgets.split(",")):
        with tempfile.TemporaryDirectory(prefix="dipgo-") as scratch:
            searches.append(measure(given.model, given.steps, budget, Path(scratch)))
        print(searches[-1].model_dump_json(), flush=True)
    record = SearchTimes(
        command="python -m benchmarks.search_time " + shlex.join(arguments or sys.argv[1:]),
        model=given.model,
        searches=searches,
        environment=environment(load),
    )
    with new_file(given.output) as draft:
        draft.write_text(record.text())


if __name__ == "__main__":
    main()
