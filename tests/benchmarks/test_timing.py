import time

import pytest

from benchmarks.bench.timing import in_rounds, order, paired, spread, timing_of


def test_spread_is_the_median_and_the_5th_and_95th_percentile():
    found = spread([float(value) for value in range(101)])
    assert (found.median, found.p5, found.p95) == (50.0, 5.0, 95.0)
    found = spread([4.0, 1.0, 3.0, 2.0])
    assert (found.median, found.p5, found.p95) == (2.5, pytest.approx(1.15), pytest.approx(3.85))


def test_speedup_is_paired_within_rounds():
    # The machine slows down fourfold in the second round; the candidate is twice as fast throughout.
    full, fast = [2.0, 8.0, 2.0], [1.0, 4.0, 1.0]
    timing = timing_of(fast, full)
    assert (timing.speedup.median, timing.speedup.p5, timing.speedup.p95) == (2.0, 2.0, 2.0)
    assert timing_of(full, full).speedup.median == 1.0
    assert timing.wall.median == 1.0
    assert timing.samples == [1.0, 4.0, 1.0]
    with pytest.raises(ValueError, match="longer"):
        paired([1.0], [1.0, 2.0])


def test_every_other_round_runs_backwards_and_all_take_at_least_the_seconds_asked_for():
    ran, seen, started = [], [], time.perf_counter()
    assert in_rounds(lambda: list("abc"), ran.append, repeats=3, seconds=0) == 3
    assert "".join(ran) == "abc" + "cba" + "abc"
    assert order("ab", 3) == ["b", "a"]
    rounds = in_rounds(lambda: ["nap"], lambda name: time.sleep(0.005), repeats=2, seconds=0.1)
    assert time.perf_counter() - started >= 0.1
    assert 2 < rounds <= 20
    in_rounds(lambda: ["a"], lambda name: None, repeats=3, seconds=0, progress=lambda *told: seen.append(told[:3]))
    assert seen == [("time", 1, 3), ("time", 2, 3), ("time", 3, 3)]
