"""How long searches take, and what memory: a sweep over budgets in a process of its own.

python -m benchmarks.studies.search_time digits-dit --steps 20 -o benchmarks/results/search-time-digits-dit.json
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.studies.study import Study, StudyRecord, Words, run, run_alone
from dipgo.base.errors import DipgoError
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


class SearchTimes(StudyRecord):
    """The result file."""

    model: str
    sampler: str
    steps: int
    preset: str
    seconds: float  # of the whole process
    searches: list[SearchTime]


def search(words: Sequence[str], budgets: Sequence[float], folder: Path) -> list[SubNet]:
    """Search for ``budgets`` in a process of its own, with its run in ``folder/run``.

    Raises:
        DipgoError: the search failed.
    """
    output = folder / ("subnets" if len(budgets) > 1 else "subnet.json")
    command = [*words, "--budget", ",".join(map(str, budgets)), "--run-folder", str(folder / "run"), "-o", str(output)]
    try:
        run_alone("dipgo.cli.main", ["search", *command])
    except DipgoError as error:
        raise DipgoError(f"the search failed: {error}") from error
    return [load_subnet(path) for path in (output.glob("[0-9]*.json") if len(budgets) > 1 else [output])]


def times(subnets: Sequence[SubNet], run: Path) -> list[SearchTime]:
    """Return what the journal of a run and the SubNets that it found tell of each budget, the largest first."""
    lines = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    found = []
    for subnet in sorted(subnets, key=lambda subnet: -(subnet.search.budget or 0.0)):
        budget, record = subnet.search.budget or 0.0, subnet.search
        own = [line for line in lines if line["phase"].split("-")[1] == f"{budget:g}"]
        found.append(
            SearchTime(
                budget=budget,
                seconds=record.seconds,
                iterations=len(own),
                gradient_seconds=round(sum(line["seconds"] for line in own), 1),
                peak_bytes=max(line["peak_memory"] for line in own),
                held_out_psnr_db=record.psnr_db,
            )
        )
    return found


def main(words: Words | None = None) -> None:
    study = Study("search_time", __doc__, words)
    study.parser.add_argument("model")
    study.parser.add_argument("--steps", type=int, default=20)
    study.parser.add_argument("--sampler", help="the pipeline's own by default")
    study.parser.add_argument("--budgets", default="0.5,0.35,0.25,0.2", help="joined by commas")
    study.parser.add_argument("--preset", default="default")
    options = study.options()
    search_words = [options.model, "--steps", str(options.steps), "--preset", options.preset]
    search_words += ["--sampler", options.sampler] if options.sampler else []
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="dipgo-") as scratch:
        subnets = search(search_words, [float(part) for part in options.budgets.split(",")], Path(scratch))
        seconds = time.perf_counter() - begun
        searches = times(subnets, Path(scratch) / "run")
    record = SearchTimes(
        model=options.model,
        sampler=subnets[0].sampler.class_name,
        steps=options.steps,
        preset=options.preset,
        seconds=round(seconds, 1),
        searches=searches,
        **study.origin(),
    )
    study.write(record)
    print(record.text())


if __name__ == "__main__":
    run(main)
