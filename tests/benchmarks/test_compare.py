import re

import numpy as np
import pytest

from benchmarks.bench.compare import compare, text, write_comparison
from benchmarks.bench.report import Row
from benchmarks.bench.timing import timing_of
from dipgo.base.errors import DipgoError, UsageError
from tests.command import dipgo

ROUNDS = 40


def timed(report, factors, seed, drop=""):
    """Give every measured row times with 3 % of noise, ``factors`` times the full program's; a row may fail."""
    generator = np.random.default_rng(seed)
    full = generator.normal(1, 0.03, ROUNDS)
    rows = []
    for row in report.rows:
        if row.timing is None:
            rows.append(row)
        elif row.name == drop:
            rows.append(Row(name=row.name, error="died"))
        else:
            own = full if row.name == "full" else generator.normal(1, 0.03, ROUNDS) * factors.get(row.name, 0.5)
            rows.append(row.model_copy(update={"timing": timing_of(own.tolist(), full.tolist())}))
    return report.model_copy(update={"rows": rows})


def with_dipgo(report, **changes):
    """Change what a report says of the SubNet's own program."""
    rows = [row.model_copy(update=changes) if row.name == "dipgo" else row for row in report.rows]
    return report.model_copy(update={"rows": rows})


def compared(first, second, folder):
    for name, report in (("a", first), ("b", second)):
        (folder / name).mkdir(parents=True)
        (folder / name / "report.json").write_text(report.text())
    found = compare(folder / "a", folder / "b" / "report.json")
    return found, {pair.name: pair for pair in found.pairs}


@pytest.fixture
def first(measured):
    return timed(measured[0], {}, 1)


def line_of(found):
    return next(line for line in text(found).splitlines() if line.startswith("dipgo"))


def test_chance_alone_is_no_difference(measured, first, tmp_path):
    found, pairs = compared(first, timed(measured[0], {}, 2), tmp_path)
    assert not any(pair.speedup.significant for pair in found.pairs if pair.speedup)
    change = pairs["dipgo"].speedup
    assert change.low < 1 < change.high
    assert change.high - change.low < 0.06
    assert not any("beyond chance" in line for line in found.lines)
    assert any(re.match(r"Largest difference of a speedup: [+-][01]\.\d%", line) for line in found.lines)


def test_many_programs_make_none_of_them_differ_by_chance(measured, tmp_path):
    """One interval of 95 % each would mark about one program in two comparisons of nine."""
    marked = 0
    for seed in range(20):
        found, _ = compared(*(timed(measured[0], {}, 2 * seed + k) for k in (0, 1)), tmp_path / str(seed))
        marked += any(pair.speedup.significant for pair in found.pairs if pair.speedup)
    assert marked <= 1


def test_few_rounds_show_no_difference(first, tmp_path):
    """Resampling one round always gives that round: an interval without width, which excludes everything."""
    found, pairs = compared(first, with_dipgo(first, timing=timing_of([0.51], [1.0])), tmp_path)
    assert pairs["dipgo"].speedup.change == pytest.approx(0.98, abs=0.02)
    assert not pairs["dipgo"].speedup.significant
    assert "too few rounds" in line_of(found)


def test_a_slower_program_is_found(measured, first, tmp_path):
    found, _ = compared(first, timed(measured[0], {"dipgo": 0.55}, 2), tmp_path)
    assert [pair.name for pair in found.pairs if pair.speedup and pair.speedup.significant] == ["dipgo"]
    (line,) = [line for line in found.lines if "beyond chance" in line]
    assert re.match(r"'dipgo' is slower, beyond chance: speedup (1\.9\d|2\.0\d) to 1\.8\d \(-(8|9)\.\d%", line)
    assert "*" in line_of(found)


def test_images_are_compared_in_pairs(first, tmp_path):
    """A difference far below the spread over images counts, as it is the same for all of them."""
    quality = first.row("dipgo").quality
    better = [value + 0.2 for value in quality.each_psnr_db]
    assert np.ptp(better) > 0.2
    changed = with_dipgo(first, quality=quality.model_copy(update={"each_psnr_db": better}))
    _, pairs = compared(first, changed, tmp_path)
    assert pairs["dipgo"].psnr.significant
    assert pairs["dipgo"].psnr.change == pytest.approx(0.2)
    assert not pairs["uniform reuse"].psnr.significant


def test_what_one_report_lacks_is_said(measured, first, tmp_path):
    changed = timed(measured[0], {}, 2, drop="uniform reuse")
    other = changed.environment.model_copy(update={"cpu": "Another"})
    found, pairs = compared(first, changed.model_copy(update={"environment": other}), tmp_path)
    assert pairs["uniform reuse"].note == "not measured in B: died"
    assert pairs["crash"].note.startswith("not measured in A: RuntimeError")
    assert any("different processors" in line and "Another" in line for line in found.lines)
    with pytest.raises(DipgoError, match="no such report"):
        compare(tmp_path / "a", tmp_path / "c")


def test_the_page_stands_alone(measured, first, tmp_path):
    found, _ = compared(first, timed(measured[0], {"dipgo": 0.6}, 2), tmp_path)
    write_comparison(found, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["comparison.html", "comparison.md"]
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert not re.search("http|<script", page)
    assert re.findall(r"<tr[^>]*><td>([^<]*)</td>", page) == [row.name for row in measured[0].rows]
    assert page.count('class="changed"') == 1
    with pytest.raises(UsageError, match="--force"):
        write_comparison(found, tmp_path / "out")


def test_the_command_line_compares(measured, tmp_path):
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
