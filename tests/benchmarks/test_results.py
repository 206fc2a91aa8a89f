from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from benchmarks.pages import results
from dipgo.base.errors import DipgoError


def test_the_committed_file_is_what_the_results_say():
    assert results.OUTPUT.read_text() == results.text(), "run: python -m benchmarks.results"


def test_every_result_is_in_it_with_its_command():
    text = results.text()
    for path in results.RESULTS.glob("*.json"):
        assert f"### {path.stem}\n" in text
        assert f"(results/{path.name})" in text
        command = json.loads(path.read_text()).get("command")
        assert command is None or f"`{command}`" in text


def test_a_command_writes_the_result_that_names_it():
    """Copied as it stands, none replaces another result."""
    for path in results.RESULTS.glob("*.json"):
        command = json.loads(path.read_text()).get("command") or ""
        named = {Path(part).name for part in command.split() if "benchmarks/results/" in part}
        assert named <= {path.name}, path.name


def test_the_published_schema_still_holds_of_the_committed_gpu_reports():
    schema = json.loads((results.ROOT / "benchmarks" / "schemas" / "gpu-1.json").read_text())
    reports = [json.loads(path.read_text()) for path in results.RESULTS.glob("gpu-*.json")]
    assert [report["schema"] for report in reports] == ["dipgo.gpu/1"] * 2
    for report in reports:
        jsonschema.validate(report, schema)


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    text = results.text()
    for name in ("quick", "quality", "sd15", "sdxl", "dit-xl", "pixart"):
        assert f"--suite {name}" in text
    assert text.count("not measured yet") == text.count("\n## ")
    (tmp_path / "new.json").write_text('{"command": "measure it", "images_per_s": 5.5, "runs": [1, 2]}')
    text = results.text()
    assert "| images_per_s | 5.5 |\n| runs | 1, 2 |" in text
    assert "commit not recorded" in text
    (tmp_path / "new.json").write_text('{"schema": "dipgo.report/1"}')
    with pytest.raises(DipgoError, match=r"new\.json: not a result that can be shown"):
        results.text()


def test_the_check_fails_on_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(results, "OUTPUT", tmp_path / "RESULTS.md")
    monkeypatch.setattr(results, "ROOT", tmp_path)
    results.main([])
    results.main(["--check"])
    (tmp_path / "RESULTS.md").write_text("typed")
    with pytest.raises(SystemExit, match="run: python -m"):
        results.main(["--check"])
