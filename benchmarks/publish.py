"""Publish a report: its JSON into the repository, its table and picture into the README. Nothing is typed by hand.

python -m benchmarks.publish build/demo/report/report.json --bundle build/demo/bundle
"""

from __future__ import annotations

import argparse
from pathlib import Path

import engines
from benchmarks.quality import SEED
from benchmarks.reference import model_of, task_of
from benchmarks.report import ReportRecord, Row, read_report
from engines.images import grid

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def markdown(report: ReportRecord, source: str) -> str:
    """Return the report's table with the lines that say what was measured on what."""
    lines = [f"- {headline.line}" for headline in report.headline]
    lines += [
        "",
        "| program | MACs | wall time | speedup | PSNR to full | class accuracy |",
        "|---|---|---|---|---|---|",
    ]
    lines += [_line(row) for row in report.rows]
    place = report.environment
    lines += [
        "",
        f"`{report.command}`, {report.rounds} interleaved rounds, {report.images} images; {report.scope}; "
        f"{place.cpu}, {place.cores} cores; parity {report.parity.relative_error_image:.1e}. "
        f"From [{source}]({source}).",
    ]
    return "\n".join(lines)


def _line(row: Row) -> str:
    if row.error or row.timing is None or row.quality is None:
        return f"| {row.name} | failed: {row.error} | | | | |"
    quality = row.quality
    psnr = "reference" if row.macs_ratio == 1 else f"{quality.psnr_db:.1f} dB"
    accuracy = "" if quality.class_accuracy is None else f"{quality.class_accuracy:.1%}"
    name = f"**{row.name}**" if row.name == "dipgo" else row.name
    return (
        f"| {name} | {row.macs_ratio:.1%} | {row.timing.wall.median * 1000:.1f} ms | "
        f"{row.timing.speedup.median:.2f} | {psnr} | {accuracy} |"
    )


def picture(bundle: Path, path: Path) -> None:
    """Save ten images of the full model above those of the program, from the same noise, four times enlarged."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("--bundle", type=Path, required=True)
    arguments = parser.parse_args()
    report = read_report(arguments.report)
    name = f"{Path(report.model.name).name}-{report.sampler.steps}-{report.budget:g}.json"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / name).write_text(report.text())
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(f"{before}{BEGIN}\n{markdown(report, f'benchmarks/results/{name}')}\n{END}{after}")
    picture(arguments.bundle, ROOT / "docs" / "digits-dit.png")


if __name__ == "__main__":
    main()
