from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks.bench.compare import Comparison, compare, text, write_comparison
from benchmarks.bench.report import ReportRecord, Row
from benchmarks.bench.timing import timing_of
from dipgo.base.errors import DipgoError, UsageError
from tests.command import dipgo

Measured = tuple[ReportRecord, Path]
ROUNDS = 40


def timed(report: ReportRecord, factors: dict[str, float], seed: int, drop: str = "") -> ReportRecord:
    """Give every measured row times with 3 % of noise, ``factors`` times the full program's; a row may fail."""
    generator = np.random.default_rng(seed)
    full = generator.normal(1, 0.03, ROUNDS)
    rows: list[Row] = []
    for row in report.rows:
        if row.timing is None:
            rows.append(row)
        elif row.name == drop:
            rows.append(Row(name=row.name, error="died"))
        else:
            own = full if row.name == "full" else generator.normal(1, 0.03, ROUNDS) * factors.get(row.name, 0.5)
            rows.append(row.model_copy(update={"timing": timing_of(own.tolist(), full.tolist())}))
    return report.model_copy(update={"rows": rows})


def compared(first: ReportRecord, second: ReportRecord, folder: Path) -> Comparison:
    for name, report in (("a", first), ("b", second)):
        (folder / name).mkdir()
        (folder / name / "report.json").write_text(report.text())
    return compare(folder / "a", folder / "b" / "report.json")


def test_chance_alone_is_no_difference(measured: Measured, tmp_path: Path):
    found = compared(timed(measured[0], {}, 1), timed(measured[0], {}, 2), tmp_path)
    pairs = {pair.name: pair for pair in found.pairs}
    assert not any(pair.speedup.significant for pair in pairs.values() if pair.speedup)
    change = pairs["dipgo"].speedup
    assert change is not None
    assert change.low < 1 < change.high
    assert change.high - change.low < 0.06
    assert not any("beyond chance" in line for line in found.lines)
    assert any(re.match(r"Largest difference of a speedup: [+-][01]\.\d%", line) for line in found.lines)


def test_many_programs_make_none_of_them_differ_by_chance(measured: Measured, tmp_path: Path):
    """One interval of 95 % each would mark about one program in two comparisons of nine."""
    marked = 0
    for seed in range(40):
        (folder := tmp_path / str(seed)).mkdir()
        found = compared(timed(measured[0], {}, 2 * seed), timed(measured[0], {}, 2 * seed + 1), folder)
        marked += any(pair.speedup.significant for pair in found.pairs if pair.speedup)
    assert marked <= 2


def test_few_rounds_show_no_difference(measured: Measured, tmp_path: Path):
    """Resampling one round always gives that round: an interval without width, which excludes everything."""
    first, rows = timed(measured[0], {}, 1), []
    for row in first.rows:
        timing = timing_of([0.51], [1.0]) if row.name == "dipgo" else row.timing
        rows.append(row.model_copy(update={"timing": timing}))
    found = compared(first, first.model_copy(update={"rows": rows}), tmp_path)
    change = next(pair.speedup for pair in found.pairs if pair.name == "dipgo")
    assert change is not None
    assert change.change == pytest.approx(0.98, abs=0.02)
    assert not change.significant
    assert "too few rounds" in next(line for line in text(found).splitlines() if line.startswith("dipgo"))


def test_a_slower_program_is_found(measured: Measured, tmp_path: Path):
    found = compared(timed(measured[0], {}, 1), timed(measured[0], {"dipgo": 0.55}, 2), tmp_path)
    changed = [pair.name for pair in found.pairs if pair.speedup and pair.speedup.significant]
    assert changed == ["dipgo"]
    (line,) = [line for line in found.lines if "beyond chance" in line]
    assert re.match(r"'dipgo' is slower, beyond chance: speedup (1\.9\d|2\.0\d) to 1\.8\d \(-(8|9)\.\d%", line)
    assert "*" in next(line for line in text(found).splitlines() if line.startswith("dipgo"))


def test_images_are_compared_in_pairs(measured: Measured, tmp_path: Path):
    """A difference far below the spread over images counts, as it is the same for all of them."""
    first, rows = timed(measured[0], {}, 1), []
    for row in first.rows:
        if row.name == "dipgo" and row.quality:
            better = [value + 0.2 for value in row.quality.each_psnr_db]
            quality = row.quality.model_copy(update={"each_psnr_db": better})
            rows.append(row.model_copy(update={"quality": quality}))
        else:
            rows.append(row)
    assert np.ptp(better) > 0.2
    found = compared(first, first.model_copy(update={"rows": rows}), tmp_path)
    pairs = {pair.name: pair.psnr for pair in found.pairs}
    own, other = pairs["dipgo"], pairs["uniform reuse"]
    assert own is not None
    assert other is not None
    assert own.significant
    assert own.change == pytest.approx(0.2)
    assert not other.significant


def test_what_one_report_lacks_is_said(measured: Measured, tmp_path: Path):
    changed = timed(measured[0], {}, 2, drop="uniform reuse")
    other = changed.environment.model_copy(update={"cpu": "Another"})
    found = compared(timed(measured[0], {}, 1), changed.model_copy(update={"environment": other}), tmp_path)
    notes = {pair.name: pair.note for pair in found.pairs}
    assert notes["uniform reuse"] == "not measured in B: died"
    assert notes["crash"].startswith("not measured in A: RuntimeError")
    assert any("different processors" in line and "Another" in line for line in found.lines)


def test_the_page_stands_alone(measured: Measured, tmp_path: Path):
    found = compared(timed(measured[0], {}, 1), timed(measured[0], {"dipgo": 0.6}, 2), tmp_path)
    write_comparison(found, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["comparison.html", "comparison.md"]
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert "http" not in page
    assert "<script" not in page
    names = re.findall(r"<tr[^>]*><td>([^<]*)</td>", page)
    assert names == [row.name for row in measured[0].rows]
    assert page.count('class="changed"') == 1
    with pytest.raises(UsageError, match="--force"):
        write_comparison(found, tmp_path / "out")


def test_the_command_line_compares(measured: Measured, tmp_path: Path):
    """The real command; without a place to write it prints alone."""
    for name, factor in (("a", 0.5), ("b", 0.6)):
        (tmp_path / f"{name}.json").write_text(timed(measured[0], {"dipgo": factor}, 1).text())
    done = dipgo("bench", "--compare", tmp_path / "a.json", tmp_path / "b.json")
    assert done.code == 0, done.err
    assert "'dipgo' is slower, beyond chance" in done.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json"]
    for rest, why in (
        (["bench"], "give a BUNDLE and -o REPORT, or --compare A B"),
        (["bench", "x", "--compare", "a", "b"], "leave BUNDLE and --suite out"),
        (["bench", "x", "-o", str(tmp_path / "r"), "--suite", "none"], "no suite 'none'; use "),
    ):
        done = dipgo(*rest)
        assert done.code == 2
        assert why in done.err
        assert len(done.err.splitlines()) == 1


def test_a_report_that_is_not_there(tmp_path: Path):
    with pytest.raises(DipgoError, match="no such report"):
        compare(tmp_path / "a", tmp_path / "b")
