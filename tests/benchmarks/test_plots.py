import re
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest

from benchmarks.bench.plots import Point, curves_of, points_of, step_bars, trade
from benchmarks.bench.report import milliseconds


def test_curves_join_what_differs_in_steps_or_budgets_alone():
    full, few, some, own, other = (
        Point(number, name, seconds, psnr, name == "dipgo", curve)
        for number, (name, seconds, psnr, curve) in enumerate(
            [
                ("full", 1, 150, "steps of DDIM"),
                ("few", 0.2, 20, "steps of DDIM"),
                ("some", 0.5, 40, "steps of DDIM"),
                ("dipgo", 0.4, 45, "dipgo"),
                ("eager", 2, 130, None),
            ]
        )
    )
    assert curves_of([full, few, some, own, other]) == {"steps of DDIM": [few, some, full]}
    larger = replace(own, seconds=0.7, psnr=60)
    assert curves_of([larger, own])["dipgo"] == [own, larger]


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
    drawn = trade(report.rows)
    ElementTree.fromstring(drawn)  # well-formed
    points = points_of(report.rows)
    assert [point.name for point in points] == [row.name for row in report.rows if not row.error]
    (own,) = boxes(drawn, "dot subject")
    dots = [*boxes(drawn, "dot"), own]
    assert len(dots) == len(points)
    assert all(0 <= left <= 560 and 0 <= top <= 380 and width == pytest.approx(10) for left, top, width, _ in dots)
    middles = sorted(left + width / 2 for left, _, width, _ in dots)
    logs = sorted(np.log(point.seconds) for point in points)
    places = 62 + 482 * (np.array(logs) - logs[0] + np.log(1.12)) / (logs[-1] - logs[0] + 2 * np.log(1.12))
    assert middles == pytest.approx(places, abs=0.1)
    for point in points:
        assert f"<title>{point.name}: {milliseconds(point.seconds)}, {point.psnr:.1f} dB</title>" in drawn
        assert f">{point.number}</text>" in drawn
    assert "<title>steps of DDIMScheduler</title>" in drawn
    assert trade([row for row in report.rows if row.error]) == ""


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
