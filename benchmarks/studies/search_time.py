"""How long searches take, and what memory: a sweep over budgets in a process of its own.

python -m benchmarks.studies.search_time digits-dit --steps 20 -o benchmarks/results/search-time-digits-dit.json
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

from benchmarks.bench.environment import Environment, environment, load_average
from dipgo.base.child_process import python_environment
from dipgo.base.errors import DipgoError
from dipgo.base.files import new_file, refuse_existing
from dipgo.base.records import Record
from dipgo.schedule.subnet import SubNet, load_subnet


class SearchTime(Record):
    """The search for one budget; the first one of a sweep computes the full trajectories that all learn from.

    ``iterations`` are gradient steps of trials and of the backups that learn on, ``gradient_seconds`` what they took,
    ``peak_bytes`` the most that the process has held until then; PSNR is on the noise that the search judges by.
    """

    budget: float
    seconds: float
    iterations: int
    gradient_seconds: float
    peak_bytes: int
    held_out_psnr_db: float


class SearchTimes(Record):
    """The result file."""

    command: str
    model: str
    sampler: str
    steps: int
    preset: str
    seconds: float  # of the whole process
    searches: list[SearchTime]
    environment: Environment


def search(words: Sequence[str], budgets: Sequence[float], folder: Path) -> list[SubNet]:
    """Search for ``budgets`` in a process of its own, with its run in ``folder/run``.

    Raises:
        DipgoError: the search failed.
    """
    found = folder / ("found" if len(budgets) > 1 else "found.json")
    command = [*words, "--budget", ",".join(map(str, budgets)), "--run-folder", str(folder / "run"), "-o", str(found)]
    done = subprocess.run(
        [sys.executable, "-m", "dipgo.cli.main", "search", *command],
        env=python_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise DipgoError(f"the search failed: {done.stderr.strip().splitlines()[-1]}")
    return [load_subnet(path) for path in (found.glob("[0-9]*.json") if len(budgets) > 1 else [found])]


def times(subnets: Sequence[SubNet], run: Path) -> list[SearchTime]:
    """Return what the journal of a run and the SubNets that it found tell of each budget, the largest first."""
    lines = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    found = []
    for subnet in sorted(subnets, key=lambda subnet: -float(subnet.search["budget"])):
        budget, record = float(subnet.search["budget"]), subnet.search
        own = [line for line in lines if line["phase"].split("-")[1] == f"{budget:g}"]
        found.append(
            SearchTime(
                budget=budget,
                seconds=record["seconds"],
                iterations=len(own),
                gradient_seconds=round(sum(line["seconds"] for line in own), 1),
                peak_bytes=max(line["peak_memory"] for line in own),
                held_out_psnr_db=record["held_out_psnr_db"][record["chosen"]],
            )
        )
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--sampler", help="the pipeline's own by default")
    parser.add_argument("--budgets", default="0.5,0.35,0.25,0.2", help="joined by commas")
    parser.add_argument("--preset", default="default")
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args(arguments)
    refuse_existing(given.output, force=True)
    words = [given.model, "--steps", str(given.steps), "--preset", given.preset]
    words += ["--sampler", given.sampler] if given.sampler else []
    load, begun = load_average(), time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="dipgo-") as scratch:
        subnets = search(words, [float(part) for part in given.budgets.split(",")], Path(scratch))
        seconds = time.perf_counter() - begun
        searches = times(subnets, Path(scratch) / "run")
    record = SearchTimes(
        command="python -m benchmarks.studies.search_time " + shlex.join(arguments or sys.argv[1:]),
        model=given.model,
        sampler=subnets[0].sampler.class_name,
        steps=given.steps,
        preset=given.preset,
        seconds=round(seconds, 1),
        searches=searches,
        environment=environment(load),
    )
    with new_file(given.output) as draft:
        draft.write_text(record.text())
    print(record.text())


if __name__ == "__main__":
    main()
