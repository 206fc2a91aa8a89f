"""Quality against search time, from the journal of a run: PSNR of the learning batches as the seconds pass.

python -m benchmarks.studies.search_curve build/search.run -o docs/search-curve.png
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.studies.study import Study, Words, run
from dipgo.base.errors import DipgoError
from dipgo.base.files import new_file
from dipgo.base.records import read_json

WINDOW = 20


def curves(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return for each budget the seconds and the mean PSNR in dB of the last 20 batches, of the phase that learns on.

    Seconds count from the first iteration of the budget's trials.

    Raises:
        DipgoError: a folder without a journal, whose search did not learn by the ``psnr`` loss, or too short a search.
    """
    lines = journal_of(folder)
    seconds: dict[str, list[float]] = defaultdict(list)
    losses: dict[str, list[float]] = defaultdict(list)
    for record in lines:
        phase, _, rest = record["phase"].partition("-")
        budget = rest.partition("-")[0]
        seconds[budget].append(record["seconds"])
        losses[budget].append(-record["loss"] if phase == "backups" else np.nan)
    by_budget = {}
    for budget, values in losses.items():
        learning = ~np.isnan(values)
        if learning.sum() < WINDOW:
            raise DipgoError(f"{folder}: fewer than {WINDOW} iterations at {budget}; let the search learn for longer")
        quality = np.convolve(np.array(values)[learning], np.full(WINDOW, 1 / WINDOW), mode="valid")
        by_budget[budget] = (np.cumsum(seconds[budget])[learning][WINDOW - 1 :], quality)
    return by_budget


def journal_of(folder: Path) -> list[dict[str, Any]]:
    """Return the journal's lines of a search that learned by the ``psnr`` loss; DipgoError of any other folder."""
    journal, run = folder / "journal.jsonl", folder / "run.json"
    if not journal.is_file() or not run.is_file():
        raise DipgoError(f"{folder}: no journal in it; give the --run-folder of a search")
    if read_json(run, "run folder")["settings"]["settings"]["loss"] != "psnr":
        raise DipgoError(f"{folder}: its search did not learn by PSNR, so its losses are no quality; search with psnr")
    return [json.loads(line) for line in journal.read_text().splitlines()]


def main(words: Words | None = None) -> None:
    from matplotlib.figure import Figure

    study = Study("search_curve", __doc__, words)
    study.parser.add_argument("run", type=Path)
    options = study.options()
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for budget, (seconds, quality) in curves(options.run).items():
        axes.plot(seconds / 60, quality, label=f"budget {budget}")
        print(
            f"budget {budget}: {quality[0]:.1f} dB after {seconds[0]:.0f} s, {quality[-1]:.1f} after {seconds[-1]:.0f}"
        )
    axes.set(xlabel="minutes of gradient steps", ylabel="PSNR of the learning batches, dB")
    axes.grid(alpha=0.3)
    axes.legend()
    with new_file(options.output) as draft:
        figure.savefig(draft, dpi=120)


if __name__ == "__main__":
    run(main)
