from __future__ import annotations

import pytest

from benchmarks.progress import Bars, counted


def test_bars_show_each_phase_to_its_end(capsys: pytest.CaptureFixture[str]):
    bars = Bars()
    assert list(counted(bars, "first")(range(3))) == [0, 1, 2]
    bars("second", 1, 2, "half")
    bars.close()
    shown = capsys.readouterr()
    assert "first" in shown.err
    assert "3/3" in shown.err
    assert "1/2" in shown.err
    assert "half" in shown.err
    assert shown.out == ""


def test_items_are_reported_once_they_are_dealt_with():
    seen: list[int] = []
    items = counted(lambda phase, done, total, figure: seen.append(done), "x")("ab")
    assert next(items) == "a"
    assert seen == [0]
    assert list(items) == ["b"]
    assert seen == [0, 1, 2]
