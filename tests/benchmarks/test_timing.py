import time

import pytest

from benchmarks.bench.timing import order, paired, spread, summarise, time_interleaved


def test_spread_is_the_median_and_the_5th_and_95th_percentile():
    found = spread([float(value) for value in range(101)])
    assert (found.median, found.p5, found.p95) == (50.0, 5.0, 95.0)
    found = spread([4.0, 1.0, 3.0, 2.0])
    assert (found.median, found.p5, found.p95) == (2.5, pytest.approx(1.15), pytest.approx(3.85))


def test_speedup_is_paired_within_rounds():
    # The machine slows down fourfold in the second round; the candidate is twice as fast throughout.
    timings = summarise({"full": [2.0, 8.0, 2.0], "fast": [1.0, 4.0, 1.0]})
    speedup = timings["fast"].speedup
    assert (speedup.median, speedup.p5, speedup.p95) == (2.0, 2.0, 2.0)
    assert timings["full"].speedup.median == 1.0
    assert timings["fast"].wall.median == 1.0
    assert timings["fast"].samples == [1.0, 4.0, 1.0]
    with pytest.raises(ValueError, match="longer"):
        paired([1.0], [1.0, 2.0])


def test_every_other_round_runs_backwards():
    ran: list[str] = []
    candidates = {name: (lambda name=name: ran.append(name)) for name in "abc"}
    timings = time_interleaved(candidates, repeats=2, warm_up=1)
    assert "".join(ran) == "abc" + "aabbcc" + "ccbbaa"  # warm-up, then each twice: untimed, timed
    assert [len(timing.samples) for timing in timings.values()] == [2, 2, 2]
    assert order("ab", 3) == ["b", "a"]


def test_time_is_taken_as_long_as_asked_and_tells_slow_from_fast():
    started = time.perf_counter()
    timings = time_interleaved({"nap": lambda: time.sleep(0.005)}, repeats=2, seconds=0.1, warm_up=0)
    assert time.perf_counter() - started >= 0.1
    assert 2 < len(timings["nap"].samples) <= 20
    timings = time_interleaved({"full": lambda: time.sleep(0.002), "slowed": lambda: time.sleep(0.01)}, repeats=5)
    assert timings["slowed"].wall.median >= 0.01
    assert timings["slowed"].speedup.p95 < 1


def test_progress_ends_at_its_total():
    seen = []
    time_interleaved({"a": int}, repeats=3, warm_up=1, progress=lambda *told: seen.append(told[:3]))
    assert seen == [("warm up", 0, 1), ("warm up", 1, 1), ("time", 1, 3), ("time", 2, 3), ("time", 3, 3)]
