import pytest

from benchmarks.bench.plan import START, TORCH_START, Parts, Plan, loop_seconds
from benchmarks.bench.subjects import ProgramSpec
from benchmarks.bench.suite import Suite

SUITE = Suite(about="mine", scopes=["loop", "step"], images=10, repeats=6, seconds=0, processes=2, warm_up=1)


def plan_of(suite):
    """One full program of 3 s, four of 1 s, and two techniques of 5 s: all of them once take 17 s."""
    return Plan.of(suite, 2, [3.0, 1.0], 5.0, compiled=5, in_torch=2, compiling=30.0)


def test_a_plan_counts_every_run():
    plan = plan_of(SUITE)
    load, loop, steps, images = 5 * START + 2 * TORCH_START + 17, 3 * 2 * 17, 3 * 17, 5 * 17
    expected = {"load 0": load, "loop 0": loop, "step 0": steps, "load 1": load, "loop 1": loop, "step 1": steps}
    assert plan.parts == expected | {"images": images}
    assert plan.line() == (
        "takes about 8 min: 30 s to compile and verify, 7 min to time 7 programs in 6 rounds, 85 s to make their images"
    )
    bare = plan_of(SUITE.changed(warm_up=0, images=0, processes=1, scopes=["loop"]))
    assert bare.parts == {"load 0": load - 17, "loop 0": 6 * 17, "images": 0}
    assert "images" not in bare.line()


def test_the_bar_counts_up_once():
    seen, plan = [], plan_of(SUITE)
    parts = Parts(lambda phase, done, total, figure: seen.append((done, total)), "measure", plan.parts)
    for part in plan.parts:
        for iteration in range(4):
            parts.report(part, iteration, 3, part)
    counts = [done for done, _ in seen]
    assert counts == sorted(counts)
    assert counts[0] == 0
    assert counts[-1] == seen[-1][1] == round(sum(plan.parts.values()))
    assert len({total for _, total in seen}) == 1


def test_what_is_slow_is_not_run_again(bundle, tmp_path):
    here, nowhere = (ProgramSpec(folder=str(folder), backend="onnxruntime", threads=1) for folder in (bundle, tmp_path))
    assert loop_seconds([nowhere, nowhere], [60.0, 7.0]) == [60.0, 7.0]
    first, again = loop_seconds([here, here], [60.0, 0.1])
    assert 0 < first < 1
    assert again == pytest.approx(first, rel=0.9)
