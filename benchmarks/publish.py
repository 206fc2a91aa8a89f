"""Publish a report: its JSON into the repository, and RESULTS.md written anew. Nothing is typed by hand.

python -m benchmarks.publish build/sd15/report/report.json
python -m benchmarks.publish build/demo/report/report.json --bundle build/demo/bundle    the README's table too
"""

from __future__ import annotations

import argparse
from pathlib import Path

import engines
from benchmarks.markdown import summary
from benchmarks.quality import SEED
from benchmarks.reference import model_of, task_of
from benchmarks.report import ReportRecord, read_report
from benchmarks.results import main as write_results
from benchmarks.suite import DEFAULT
from engines.images import grid

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def picture(bundle: Path, path: Path) -> None:
    """Save ten images of the full model above those of the program, from the same noise, enlarged."""
    import numpy as np
    import torch

    with engines.load(bundle) as program:
        task = task_of(program.bundle, model_of(program.bundle, None))
        classes = list(range(10))
        own = program.generate(classes, SEED)
        task.pipe.set_progress_bar_config(disable=True)
        full = task.pipe(
            classes,
            guidance_scale=task.guidance_scale,
            num_inference_steps=task.sampler.steps,
            generator=torch.Generator().manual_seed(SEED),
            output_type="np",
        ).images
    both = grid(np.concatenate([full, own]), columns=len(classes))
    path.parent.mkdir(exist_ok=True)
    both.resize((both.width * 3, both.height * 3), resample=0).save(path)


def place_of(report: ReportRecord) -> Path:
    """Return where a report's JSON goes: by model, steps and budget, and by suite where it is not the default one."""
    budget = report.budget if report.budget is not None else report.cost.ratio
    name = f"{Path(report.model.name).name}-{report.sampler.steps}-{budget:.3g}"
    return RESULTS / (f"{name}.json" if report.suite in (None, DEFAULT) else f"{report.suite}-{name}.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("--bundle", type=Path, help="put the table and a picture of digits into the README too")
    arguments = parser.parse_args()
    report = read_report(arguments.report)
    place = place_of(report)
    RESULTS.mkdir(exist_ok=True)
    place.write_text(report.text())
    if arguments.bundle:
        readme = ROOT / "README.md"
        before, _, rest = readme.read_text().partition(BEGIN)
        _, _, after = rest.partition(END)
        readme.write_text(f"{before}{BEGIN}\n{summary(report, f'benchmarks/results/{place.name}')}\n{END}{after}")
        picture(arguments.bundle, ROOT / "docs" / "digits-dit.png")
    write_results([])


if __name__ == "__main__":
    main()
