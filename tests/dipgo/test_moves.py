"""Moves of computed steps: against the best of all placements, where all can be tried."""

import itertools

import numpy as np
import pytest

from dipgo.searching.local_search import GAIN_DB, REACH, behind, move_steps, neighbours

CALLS = 9


@pytest.mark.parametrize("seed", range(5))
def test_where_steps_do_well_apart_the_best_placement_is_found(seed):
    """Each step is the better the nearer it lies to its own place, so that no move leads astray."""
    places = np.array([0, *sorted(np.random.default_rng(seed).choice(np.arange(1, CALLS), 3, replace=False))])

    def score(steps, group):
        return -np.abs(np.array(steps) - places).sum(keepdims=True).astype(float)

    assert move_steps((0, 1, 2, 3), CALLS, score, 1, 10_000, seed) == tuple(places)


@pytest.mark.parametrize("seed", range(5))
def test_no_move_of_one_step_is_better_in_the_end(seed):
    """Whatever the scores are; and each placement is measured once."""
    table = {}
    chance = np.random.default_rng(seed)

    def score(steps, group):
        assert steps not in table
        assert steps[0] == 0
        assert list(steps) == sorted(set(steps))
        assert len(steps) == 4
        assert steps[-1] < CALLS
        table[steps] = 10 * chance.random()
        return np.array([table[steps]])

    told = []
    found = move_steps(
        (0, 2, 4, 6), CALLS, score, 1, 10_000, seed, lambda measured, best: told.append((measured, best))
    )
    assert max(table[steps] for steps in neighbours(found, CALLS)) <= table[found] + GAIN_DB
    assert table[found] >= table[0, 2, 4, 6]
    assert [measured for measured, _ in told] == list(range(1, len(table)))
    assert told[-1][1] == table[found]


def test_moves_end_when_enough_are_measured():
    asked = []

    def score(steps, group):
        asked.append(steps)
        return np.array([float(len(asked))])  # always better

    found = move_steps((0, 3, 6), CALLS, score, 1, 5, seed=0)
    assert len(asked) == 1 + 5
    assert found == asked[-1]
    assert move_steps((0, 3, 6), CALLS, score, 1, 0, seed=0) == (0, 3, 6)


def test_what_is_better_by_more_than_chance_survives_the_race():
    """Images differ much, and all alike in every placement: pairs decide, not means of different images."""
    places, groups = np.array([0, 3, 4, 7]), 4
    images = np.random.default_rng(0).normal(30, 5, (groups, 4))
    measured = []

    def score(steps, group):
        measured.append((steps, group))
        return images[group] - np.abs(np.array(steps) - places).sum()

    assert move_steps((0, 1, 2, 3), CALLS, score, groups, 10_000, seed=0) == tuple(places)
    assert len(set(measured)) == len(measured)
    final = [steps for steps, group in measured if group == groups - 1]
    assert {steps for steps, group in measured if group > 0} == set(final)  # worse ones end after the first group


def test_a_race_goes_on_while_chance_may_decide():
    assert behind(np.array([-1.0, -1.0]))
    assert not behind(np.array([-1.0, 0.9]))
    assert not behind(np.array([0.0]))
    assert behind(np.array([-0.1]))
    gains = np.array([-2.0, 1.0, -2.0, 1.0])
    assert not behind(gains)  # -0.5 ± 0.87
    assert behind(np.tile(gains, 4))  # -0.5 ± 0.39


def test_neighbours_are_all_moves_of_one_step():
    steps = (0, 2, 7)
    expected = {
        other
        for other in itertools.combinations(range(CALLS), 3)
        if other[0] == 0
        and any(
            {*steps} - {*other} == {gone} and {*other} - {*steps} == {new} and abs(gone - new) <= REACH
            for gone, new in itertools.product(steps[1:], range(CALLS))
        )
    }
    found = list(neighbours(steps, CALLS))
    assert set(found) == expected
    assert len(found) == len(expected)
