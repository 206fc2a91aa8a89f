from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.bench.plots import Point, frontier, pareto, points_of, step_bars
from benchmarks.bench.report import ReportRecord

Measured = tuple[ReportRecord, Path]


def test_the_frontier_is_what_nothing_beats():
    full, fast, good, poor = (
        Point(number, name, speedup, psnr, False)
        for number, (name, speedup, psnr) in enumerate(
            [("full", 1, 150), ("fast", 3, 20), ("good", 2, 40), ("poor", 1.9, 39)]
        )
    )
    assert frontier([full, fast, good, poor]) == [full, good, fast]


def test_every_measured_program_is_a_point(measured: Measured):
    report = measured[0]
    drawn = pareto(report.rows)
    ElementTree.fromstring(drawn)  # well-formed
    names = [point.name for point in points_of(report.rows)]
    assert names == [row.name for row in report.rows if not row.error]
    assert drawn.count("<circle") == len(names)
    assert drawn.count('class="dot subject"') == 1
    circles = [tuple(map(float, pair)) for pair in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', drawn)]
    assert all(0 <= x <= 720 and 0 <= y <= 380 for x, y in circles)


def test_nothing_is_drawn_of_nothing(measured: Measured):
    assert pareto([row for row in measured[0].rows if row.error]) == ""


@pytest.mark.parametrize("steps", [1, 20, 100])
def test_a_bar_a_step(steps: int):
    drawn = step_bars([0.001 * (1 + step % 3) for step in range(steps)], [0.004] * steps)
    ElementTree.fromstring(drawn)
    heights = [float(value) for value in re.findall(r'class="mine"[^>]*height="([\d.]+)"', drawn)]
    assert len(heights) == steps
    behind = {float(value) for value in re.findall(r'class="theirs"[^>]*height="([\d.]+)"', drawn)}
    assert len(behind) == 1
    assert heights[0] == pytest.approx(behind.pop() / 4, rel=0.02)


def test_the_full_program_is_left_out_where_it_has_other_steps():
    drawn = step_bars([0.001, 0.002], [0.004] * 3)
    assert set(re.findall(r'class="theirs"[^>]*height="([\d.]+)"', drawn)) == {"0.0"}
    assert "full" not in drawn
