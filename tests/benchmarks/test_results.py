import json
import shutil
from pathlib import Path

import jsonschema
import pytest

from benchmarks.pages import places, results
from benchmarks.pages.render import today
from tests.checks import refused

COMMITTED = sorted((results.ROOT / "benchmarks" / "results").glob("*.json"))
PAGES = sorted((results.ROOT / "docs" / "results").glob("*.md"))


@pytest.fixture
def repository(tmp_path):
    """A repository with one page, and no results yet."""
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "docs" / "results").mkdir(parents=True)
    (tmp_path / "docs" / "results" / "page.md").write_text("# How fast\n")
    return tmp_path


def test_the_committed_pages_are_what_the_results_say():
    for page, text in results.written().items():
        assert page.read_text() == text, f"{page.name}; run: python -m benchmarks.results"


def test_every_result_is_on_one_page_with_the_command_that_writes_it_alone():
    """Copied as it stands, none replaces another result."""
    text = {page: page.read_text() for page in PAGES}
    homes = [name for page in PAGES for name in places.names(text[page])]
    assert sorted(homes) == sorted(path.stem for path in COMMITTED)
    for path in COMMITTED:
        page = next(page for page in PAGES if path.stem in places.names(text[page]))
        assert f"(../../benchmarks/results/{path.name})" in text[page]
        command = json.loads(path.read_text()).get("command") or ""
        assert not command or today(f"`{command}`") in text[page]
        named = {Path(part).name for part in command.split() if "benchmarks/results/" in part}
        assert named <= {path.name}, path.name


def test_the_published_schema_still_holds_of_the_committed_gpu_reports():
    schema = json.loads((results.ROOT / "benchmarks" / "schemas" / "gpu-1.json").read_text())
    reports = [report for path in COMMITTED if (report := json.loads(path.read_text())).get("schema") == "dipgo.gpu/1"]
    assert len(reports) == 2
    for report in reports:
        jsonschema.validate(report, schema)


def test_records_are_shown_with_todays_names():
    recorded = "`python -m benchmarks.search_table found --publish search-dpm -o x.json`, best fixed policy of all"
    assert today(recorded) == "`python -m benchmarks.studies.search_table found -o x.json`, best fixed schedule of all"
    assert today("`python -m benchmarks.export_table --publish`") == "`python -m benchmarks.studies.export_table`"
    kept = "`python -m benchmarks.gpu -o build/gpu`, a SubNet that is published"
    assert today(kept) == kept


def test_what_is_missing_is_said(repository):
    index = repository / "benchmarks" / "RESULTS.md"
    text = results.written(repository)[index]
    for name in ("quick", "quality", "sd15", "sdxl", "dit-xl", "pixart"):
        assert f"--suite {name}" in text
    new = repository / "benchmarks" / "results" / "new.json"
    new.write_text('{"command": "measure it", "images_per_s": 5.5, "runs": [1, 2]}')
    text = results.written(repository)[index]
    assert "| [new](#new) | [new](results/new.json) | commit not recorded |" in text
    assert "| images per s | 5.5 |\n| runs | 1, 2 |" in text
    new.write_text('{"schema": "dipgo.report/1"}')
    with refused(r"new\.json: not a result that can be shown"):
        results.written(repository)


def test_a_result_goes_where_a_page_has_its_place(repository):
    page, index = repository / "docs" / "results" / "page.md", repository / "benchmarks" / "RESULTS.md"
    page.write_text("# How fast\n\n<!-- new:begin -->\nold\n<!-- new:end -->\n\nbelow\n")
    (repository / "benchmarks" / "results" / "new.json").write_text('{"images_per_s": 5.5}')
    results.main([], repository)
    text = page.read_text()
    assert text.startswith("# How fast\n\n<!-- new:begin -->\n| figure | value |")
    assert text.endswith("commit not recorded.\n<!-- new:end -->\n\nbelow\n")
    assert (
        "| [How fast](../docs/results/page.md) | [new](results/new.json) | commit not recorded |" in index.read_text()
    )
    assert "5.5" not in index.read_text()
    page.write_text("<!-- missing:begin -->\n<!-- missing:end -->\n")
    with refused("no result is called 'missing'"):
        results.written(repository)


def test_the_check_fails_on_another_file(repository):
    shutil.copy(COMMITTED[0], repository / "benchmarks" / "results")
    page = repository / "docs" / "results" / "page.md"
    page.write_text(f"<!-- {COMMITTED[0].stem}:begin -->\n<!-- {COMMITTED[0].stem}:end -->\n")
    results.main([], repository)
    results.main(["--check"], repository)
    for file in (page, repository / "benchmarks" / "RESULTS.md"):
        right = file.read_text()
        file.write_text(right.replace("commit", "a typed word"))
        with pytest.raises(SystemExit, match="run: python -m"):
            results.main(["--check"], repository)
        file.write_text(right)


def test_a_page_with_damaged_markers_is_refused_and_one_without_stays():
    for page in (
        "<!-- a:begin -->\nno end",
        "<!-- a:end -->\n<!-- a:begin -->",
        "<!-- a:begin -->\n<!-- b:begin -->\n<!-- b:end -->\n<!-- a:end -->",
        "<!-- a:begin -->\n<!-- a:end -->\n<!-- b:end -->",
    ):
        with refused("mend the page's markers"):
            places.fill(page, lambda name: "table")
    assert places.fill("nothing\n", lambda name: "table") == "nothing\n"
