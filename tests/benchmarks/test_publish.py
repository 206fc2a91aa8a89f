"""Publishing a report into a repository that stands in for this one."""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.bench.report import ReportRecord
from benchmarks.bench.strips import LEFT, SIDE
from benchmarks.pages import publish
from benchmarks.pages.render import markdown, today


def test_a_report_is_published_whole(tmp_path, measured, bundle, monkeypatch):
    report, folder = measured
    name = publish.place_of(report)
    (tmp_path / "benchmarks").mkdir()
    page = tmp_path / "docs" / "results" / "page.md"
    page.parent.mkdir(parents=True)
    begin, end = (f"<!-- {Path(name).stem}:{half} -->" for half in ("begin", "end"))
    page.write_text(f"above\n{begin}\nold\n{end}\nbelow\n")
    monkeypatch.setattr(sys, "argv", ["publish", str(folder / "report.json"), "--bundle", str(bundle)])
    publish.main(tmp_path)
    published = tmp_path / "benchmarks" / "results" / name
    assert ReportRecord.model_validate_json(published.read_text()) == report
    assert f"[{published.stem}](results/{name})" in (tmp_path / "benchmarks" / "RESULTS.md").read_text()
    table = markdown(published, f"../../benchmarks/results/{name}")
    assert page.read_text() == f"above\n{begin}\n{table}\n{end}\nbelow\n"
    shown = sorted(report.headline, key=lambda headline: table.index(today(headline.line)))
    kinds = [headline.kind for headline in shown]
    assert "loss" in kinds
    assert kinds == sorted(kinds, key=["result", "loss", "note"].index), "the trade first"
    with Image.open(next((tmp_path / "docs").glob("*.png"))) as picture:
        pixels = np.asarray(picture.convert("RGB"), int)
    labels, images = pixels[:, :LEFT], pixels[:, LEFT:]
    full, own, plain = np.split(images, 3)
    assert full.shape[1] >= publish.COLUMNS * SIDE
    assert full.std() > 0
    for other in (own, plain):
        assert 0 < np.abs(full - other).mean() < 128, "alike and not the same"
    assert all((label < 128).any() and (label > 250).any() for label in np.split(labels, 3)), "black on white"


def test_the_place_tells_suite_model_steps_and_budget(measured):
    report, _ = measured
    by_suite = {
        suite: publish.place_of(report.model_copy(update={"suite": suite, "budget": 0.35}))
        for suite in (None, publish.DEFAULT, "sd15", "tiny-dit")
    }
    assert by_suite[None] == by_suite[publish.DEFAULT] == by_suite["tiny-dit"] == "tiny-dit-8-0.35.json"
    assert by_suite["sd15"] == "sd15-tiny-dit-8-0.35.json"


def test_columns_are_spread_over_a_file_of_prompts(bundle, tmp_path):
    (tmp_path / "names.txt").write_text("\n".join(str(number) for number in range(80)))
    assert publish.columns(bundle, tmp_path / "names.txt") == [str(number) for number in range(5, 80, 10)]
    assert len(publish.columns(bundle, None)) == publish.COLUMNS
