import re
from xml.etree import ElementTree

import pytest

from benchmarks.bench.plots import Point, frontier, pareto, points_of, step_bars


def test_the_frontier_is_what_nothing_beats():
    full, fast, good, poor = (
        Point(number, name, speedup, psnr, False)
        for number, (name, speedup, psnr) in enumerate(
            [("full", 1, 150), ("fast", 3, 20), ("good", 2, 40), ("poor", 1.9, 39)]
        )
    )
    assert frontier([full, fast, good, poor]) == [full, good, fast]


def boxes(drawn, kind):
    """Return left, top, width and height in pixels of what is drawn with this class."""
    found = []
    for path in re.findall(rf'<g class="{kind}">.*?<path d="([^"]*)"', drawn, re.DOTALL):
        numbers = [float(number) for number in re.findall(r"-?[\d.]+", path)]
        across, down = numbers[::2], numbers[1::2]
        found.append((min(across), min(down), max(across) - min(across), max(down) - min(down)))
    return found


def test_every_measured_program_is_a_dot_at_its_values(measured):
    report = measured[0]
    drawn = pareto(report.rows)
    ElementTree.fromstring(drawn)  # well-formed
    points = points_of(report.rows)
    assert [point.name for point in points] == [row.name for row in report.rows if not row.error]
    (own,) = boxes(drawn, "dot subject")
    dots = [*boxes(drawn, "dot"), own]
    assert len(dots) == len(points)
    assert all(0 <= left <= 720 and 0 <= top <= 380 and width == pytest.approx(10) for left, top, width, _ in dots)
    middles = sorted(left + width / 2 for left, _, width, _ in dots)
    scale = 642 / (1.08 * max(point.speedup for point in points))
    assert middles == pytest.approx(sorted(58 + scale * point.speedup for point in points), abs=0.1)
    for point in points:
        assert f"<title>{point.name}: {point.speedup:.2f} times" in drawn
        assert f">{point.number}</text>" in drawn
    assert pareto([row for row in report.rows if row.error]) == ""


@pytest.mark.parametrize("steps", [1, 20, 100])
def test_a_bar_a_step(steps):
    drawn = step_bars([0.001 * (1 + step % 3) for step in range(steps)], [0.004] * steps)
    ElementTree.fromstring(drawn)
    heights = [height for *_, height in boxes(drawn, "mine")]
    assert len(heights) == steps
    behind = [height for *_, height in boxes(drawn, "theirs")]
    assert len(behind) == steps
    assert heights[0] == pytest.approx(behind[0] / 4, rel=0.02)
    other = step_bars([0.001, 0.002], [0.004] * 3)  # the full program has other steps, and is left out
    assert not boxes(other, "theirs")
    assert "full" not in other
