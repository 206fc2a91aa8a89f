"""How long a search takes, and what memory: one budget at a time, each in a process of its own.

python -m benchmarks.search_time digits-dit --steps 20 -o benchmarks/results/search-time-digits-dit.json
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

from benchmarks.environment import Environment, environment, load_average
from dipgo.errors import DipgoError
from dipgo.files import new_file
from dipgo.records import Record
from dipgo.subnet import load_subnet


class SearchTime(Record):
    """One search.

    ``seconds`` are of the whole process, ``iterations`` gradient steps of all phases, ``peak_bytes`` as the search's
    journal tells it; PSNR is on the noise that the search judges by.
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
    steps: int
    preset: str
    searches: list[SearchTime]
    environment: Environment


def measure(model: str, steps: int, budget: float, preset: str, folder: Path) -> SearchTime:
    """Search once, in a process of its own that writes into ``folder``.

    Raises:
        DipgoError: the search failed.
    """
    subnet, run = folder / "subnet.json", folder / "run"
    words = ["search", model, "--steps", steps, "--budget", budget, "--preset", preset, "--run-folder", run]
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "dipgo.cli", *map(str, words), "-o", subnet],
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - begun
    if done.returncode:
        raise DipgoError(f"the search at {budget:g} failed: {done.stderr.strip().splitlines()[-1]}")
    journal = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    record = load_subnet(subnet).search
    return SearchTime(
        budget=budget,
        seconds=round(seconds, 1),
        iterations=len(journal),
        peak_bytes=max(line["peak_memory"] for line in journal),
        held_out_psnr_db=record["held_out_psnr_db"][record["chosen"]],
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--budgets", default="0.5,0.35,0.25,0.2", help="joined by commas")
    parser.add_argument("--preset", default="default")
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args(arguments)
    load, searches = load_average(), []
    for budget in map(float, given.budgets.split(",")):
        with tempfile.TemporaryDirectory(prefix="dipgo-") as scratch:
            searches.append(measure(given.model, given.steps, budget, given.preset, Path(scratch)))
        print(searches[-1].model_dump_json(), flush=True)
    record = SearchTimes(
        command="python -m benchmarks.search_time " + shlex.join(arguments or sys.argv[1:]),
        model=given.model,
        steps=given.steps,
        preset=given.preset,
        searches=searches,
        environment=environment(load),
    )
    with new_file(given.output) as draft:
        draft.write_text(record.text())


if __name__ == "__main__":
    main()
