"""Publish a report: its JSON into the repository, and RESULTS.md written anew. Nothing is typed by hand.

python -m benchmarks.pages.publish build/sd15/report/report.json
python -m benchmarks.pages.publish build/demo/report/report.json --bundle build/demo/bundle    its picture and table too

The table goes between the README's markers of the suite's name (the default suite's: results), the picture into docs/.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.bench.page import summary
from benchmarks.bench.reference import model_of, task_of
from benchmarks.bench.report import ReportRecord, read_report
from benchmarks.bench.subjects import IMAGE_SEED, given_of
from benchmarks.bench.suite import DEFAULT
from benchmarks.pages.readme import README, put_between
from benchmarks.pages.results import main as write_results
from engines.pipeline.images import grid
from engines.pipeline.pipeline import load

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def picture(bundle: Path, path: Path) -> None:
    """Save ten images of the full model above those of the program, from the same noise, 96 pixels each or more."""
    import numpy as np
    import torch

    with load(bundle) as program:
        task = task_of(program.bundle, model_of(program.bundle, None))
        given = given_of(program, 10)
        own = program.generate(given, IMAGE_SEED)
        task.pipe.set_progress_bar_config(disable=True)
        full = task.pipe(
            given,
            guidance_scale=task.guidance_scale,
            num_inference_steps=task.sampler.steps,
            generator=torch.Generator().manual_seed(IMAGE_SEED),
            output_type="np",
        ).images
    both = grid(np.concatenate([full, own]), columns=len(given))
    path.parent.mkdir(exist_ok=True)
    scale = -(-96 // own.shape[1])
    both.resize((both.width * scale, both.height * scale), resample=0).save(path)


def place_of(report: ReportRecord) -> Path:
    """Return where a report's JSON goes: by model, steps and budget, and by suite where it is not the default one."""
    budget = report.budget if report.budget is not None else report.cost.ratio
    model = Path(report.model.name).name
    suite = "" if report.suite in (None, DEFAULT, model) else f"{report.suite}-"
    return RESULTS / f"{suite}{model}-{report.sampler.steps}-{budget:.3g}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("--bundle", type=Path, help="put the table and a picture into the README too")
    arguments = parser.parse_args()
    report = read_report(arguments.report)
    place = place_of(report)
    RESULTS.mkdir(exist_ok=True)
    place.write_text(report.text())
    if arguments.bundle:
        marker = "results" if report.suite in (None, DEFAULT) else str(report.suite)
        put_between(README, marker, summary(report, f"benchmarks/results/{place.name}"))
        picture(arguments.bundle, ROOT / "docs" / f"{Path(report.model.name).name}.png")
    write_results([])


if __name__ == "__main__":
    main()
