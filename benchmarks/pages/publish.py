"""Publish a report: its JSON into the repository, its picture, and all pages of results written anew.

python -m benchmarks.pages.publish build/sd15/report/report.json
python -m benchmarks.pages.publish benchmarks/results/emoji-sd-50-0.2.json \\
    --bundle build/emoji50-layer/bundle --prompts benchmarks/names/emoji-sd-judge.txt

The second makes ``docs/MODEL.png`` too: the full model, the bundle, and plain steps at equal MACs, from the same noise.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.bench.report import ReportRecord, read_report
from benchmarks.bench.subjects import Inputs, inputs_for
from benchmarks.bench.suite import DEFAULT
from benchmarks.pages.picture import picture
from benchmarks.pages.results import ROOT
from benchmarks.pages.results import main as write_pages
from dipgo.model.prompts import read_prompts
from export.bundle import open_bundle

COLUMNS = 8


def columns(bundle: Path, prompts: Path | None) -> Inputs:
    """Return what a picture's columns are of: every n-th prompt of a file, or the bundle's own classes or prompts."""
    if prompts is None:
        return inputs_for(open_bundle(bundle).record.conditioning, COLUMNS)
    names = read_prompts(prompts)
    return list(names[len(names) // COLUMNS // 2 :: max(1, len(names) // COLUMNS)][:COLUMNS])


def place_of(report: ReportRecord) -> str:
    """Return the name of a report's JSON: by model, steps and budget, and by suite where it is not the default one."""
    budget = report.budget if report.budget is not None else report.cost.ratio
    model = Path(report.model.name).name
    suite = "" if report.suite in (None, DEFAULT, model) else f"{report.suite}-"
    return f"{suite}{model}-{report.sampler.steps}-{budget:.3g}.json"


def main(root: Path = ROOT) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("--bundle", type=Path, help="make its picture too")
    parser.add_argument("--prompts", type=Path, help="what the picture is of, one a line")
    arguments = parser.parse_args()
    report = read_report(arguments.report)
    results = root / "benchmarks" / "results"
    results.mkdir(exist_ok=True)
    (results / place_of(report)).write_text(report.text())
    if arguments.bundle:
        conditions = columns(arguments.bundle, arguments.prompts)
        picture(arguments.bundle, report, conditions, root / "docs" / f"{Path(report.model.name).name}.png")
    write_pages([], root)


if __name__ == "__main__":
    main()
