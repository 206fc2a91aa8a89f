"""Rows in the manner of published caches: their series, their paths, and what they cost."""

from itertools import combinations

import numpy as np
import pytest

from benchmarks.studies.rivals import best_path, noise_levels, rivals, series, taylor
from tests import zoo

STEPS, BUDGET = 8, 0.5


def test_a_series_is_exact_for_what_it_is_made_for():
    """A line through any two times, a parabola through three that are evenly spaced and near."""
    past, ahead = [5.0, 3.0, 1.0], 6.0
    line = series(past[:2], ahead) @ [2 * time + 1 for time in past[:2]]
    assert line == pytest.approx(13)
    assert series(past[:1], ahead).tolist() == [1.0]
    weights = series(past, ahead)
    assert weights.sum() == pytest.approx(1)
    # TaylorSeer's: f + f' k + f'' k²/2 with f' = (f5 - f3) / 2 and f'' = (f5 - 2 f3 + f1) / 4
    values = np.array([7.0, 4.0, 2.0])
    assert weights @ values == pytest.approx(7 + 3 / 2 + (7 - 8 + 2) / 4 / 2)


def test_a_path_goes_where_the_velocity_bends():
    """Of all paths none has a lower error: compared with every one of them on a curved flow."""
    generator = np.random.default_rng(0)
    levels = np.linspace(0, -1, STEPS + 1)
    velocities = np.sin(9 * levels[:-1] ** 2)[:, None, None] + 0.1 * generator.normal(size=(STEPS, 2, 3)).cumsum(0)
    latents = np.concatenate([np.zeros((1, 2, 3)), (velocities * np.diff(levels)[:, None, None]).cumsum(0)])

    def error(path):
        total, ends = 0.0, [*path, STEPS]
        for place, own in enumerate(path):
            astray = np.zeros((2, 3))
            for step in range(own + 1, ends[place + 1]):
                past = path[max(0, place - 1) : place + 1][::-1]
                line = series([levels[each] for each in past], levels[step]) @ velocities[past].reshape(len(past), -1)
                astray += (levels[step + 1] - levels[step]) * (line.reshape(2, 3) - velocities[step])
            total += np.square(astray).sum()
        return total

    paths = [[0, *rest] for rest in combinations(range(1, STEPS), 3)]
    assert best_path(latents, levels, 4) == min(paths, key=error)


@pytest.mark.slow
def test_rows_fit_the_budget_and_are_there_for_flows_alone():
    task = zoo.task("flux", STEPS, sites="layer")
    levels = noise_levels(task)
    assert levels is not None
    assert levels[-1] == pytest.approx(-1)  # from noise to none
    rows = rivals(task, BUDGET)
    assert list(rows) == [
        "TaylorSeer-like, first order",
        "TaylorSeer-like, second order",
        "MeanCache-like average velocity",
        "DPCache-like, the best path",
    ]
    assert rows["TaylorSeer-like, second order"][0].history == 3
    for schedule in (each for schedules in rows.values() for each in schedules):
        assert schedule.share(task.trace.macs) <= BUDGET + 0.02
        assert schedule.gates.any(axis=1).sum() > 1
    (path,) = rows["DPCache-like, the best path"]
    assert path.gates[:, task.trace.output_sites()[0]].sum() == STEPS * BUDGET
    dit = zoo.task("dit", STEPS, sites="layer")
    assert noise_levels(dit) is None
    assert list(rivals(dit, BUDGET)) == list(rows)[:2]


def test_what_a_series_serves_is_its_weights():
    task = zoo.task("flux", STEPS, sites="layer")
    gates = np.zeros((STEPS, len(task.trace.sites)), bool)
    gates[[0, 2, 4]] = True
    schedule = taylor(task.trace, gates, np.arange(STEPS, dtype=float), 1)
    out = next(weights for name, weights in schedule.backups.items() if "proj_out" in name and "single" not in name)
    assert out[5].tolist() == [1.5, -0.5]
    assert out[1].tolist() == [1.0, 0.0]
