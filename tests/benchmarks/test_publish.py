"""Publishing a report into a repository that stands in for this one."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.bench.page import summary
from benchmarks.bench.report import ReportRecord
from benchmarks.pages import publish, results
from benchmarks.pages.readme import put_between
from dipgo.base.errors import DipgoError


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty repository whose README has a place for the default suite's table."""
    (tmp_path / "README.md").write_text("above\n<!-- results:begin -->\nold\n<!-- results:end -->\nbelow\n")
    found = tmp_path / "benchmarks" / "results"
    found.mkdir(parents=True)
    for module in (publish, results):
        monkeypatch.setattr(module, "ROOT", tmp_path)
        monkeypatch.setattr(module, "RESULTS", found)
    monkeypatch.setattr(publish, "README", tmp_path / "README.md")
    monkeypatch.setattr(results, "OUTPUT", tmp_path / "benchmarks" / "RESULTS.md")
    return tmp_path


def test_a_report_is_published_whole(
    repository: Path, measured: tuple[ReportRecord, Path], bundle: Path, monkeypatch: pytest.MonkeyPatch
):
    report, folder = measured
    monkeypatch.setattr(sys, "argv", ["publish", str(folder / "report.json"), "--bundle", str(bundle)])
    publish.main()
    (published,) = (repository / "benchmarks" / "results").glob("*.json")
    assert ReportRecord.model_validate_json(published.read_text()) == report
    assert f"### {published.stem}\n" in (repository / "benchmarks" / "RESULTS.md").read_text()
    table = summary(report, f"benchmarks/results/{published.name}")
    readme = (repository / "README.md").read_text()
    assert readme == f"above\n<!-- results:begin -->\n{table}\n<!-- results:end -->\nbelow\n"
    with Image.open(next((repository / "docs").glob("*.png"))) as picture:
        pixels = np.asarray(picture.convert("RGB"), int)
    full, own = np.split(pixels, 2)
    assert full.shape[1] >= 10 * 96
    assert full.std() > 0
    assert 0 < np.abs(full - own).mean() < 128, "the program's images below, alike and not the same"


def test_the_place_tells_suite_model_steps_and_budget(measured: tuple[ReportRecord, Path]):
    report, _ = measured
    by_suite = {
        suite: publish.place_of(report.model_copy(update={"suite": suite, "budget": 0.35})).name
        for suite in (None, publish.DEFAULT, "sd15", "tiny-dit")
    }
    assert by_suite[None] == by_suite[publish.DEFAULT] == by_suite["tiny-dit"] == "tiny-dit-8-0.35.json"
    assert by_suite["sd15"] == "sd15-tiny-dit-8-0.35.json"


def test_a_readme_without_a_place_is_refused_and_stays(tmp_path: Path):
    readme = tmp_path / "README.md"
    for text in ("nothing", "<!-- results:begin -->\nno end", "<!-- results:end -->\n<!-- results:begin -->"):
        readme.write_text(text)
        with pytest.raises(DipgoError, match="has no place '<!-- results:begin -->"):
            put_between(readme, "results", "table")
        assert readme.read_text() == text
