"""SubNets that a search is given to begin with."""

from dataclasses import replace

import numpy as np
import pytest

from dipgo.base.errors import DipgoError
from dipgo.schedule.fixed_schedules import Rule
from dipgo.schedule.schedule import Schedule
from dipgo.searching.backup_fit import Backups
from dipgo.searching.search import search, sweep
from tests import zoo
from tests.checks import misused

STEPS = 6
LEARN = zoo.search_config(STEPS, drops=0, contenders=1, trial_iterations=0, backup_iterations=6)
JUDGE = LEARN.changed(backup_iterations=0)


@pytest.fixture(scope="module")
def found(task):
    return search(task, LEARN)


def reusing(task, budget):
    """A schedule by no rule: the last outputs are served between whole steps, which are packed at the end."""
    rule = Rule()
    count = len(rule.whole_steps(task.trace.macs, STEPS, budget)[0])
    return task.subnet(Schedule(rule.gates(task.trace, STEPS, [0, *range(STEPS - count + 1, STEPS)])))


def test_a_search_goes_on_from_what_another_found(task, found):
    again = search(task, JUDGE, starts=[found])
    assert again.search.held_out_psnr_db["given 1"] == found.search.psnr_db
    assert again.search.chosen == "given 1"
    assert np.array_equal(again.gates, found.gates)
    for name, weights in found.schedule.backups.items():
        assert np.array_equal(again.schedule.backups[name], weights)
    on = search(task, LEARN, starts=[found])
    assert any(name.startswith("given 1, backups learned") for name in on.search.held_out_psnr_db)


@pytest.mark.parametrize("by_pass", [True, False])
@pytest.mark.parametrize("by_channel", [True, False])
def test_backups_begin_with_the_weights_of_a_subnet(task, found, by_channel, by_pass):
    """With as long a history, and with one output more that begins at nothing."""
    for history in (2, 3):
        backups = Backups(task.trace, found.schedule, history, by_channel, by_pass)
        for name, weights in backups.schedule().backups.items():
            assert np.allclose(weights[:, :2], found.schedule.backups[name], atol=1e-7)
            assert not weights[:, 2:].any()


def test_a_schedule_that_only_reuses_is_judged_so_and_learns_backups(task):
    names = search(task, LEARN.changed(budget=0.6), starts=[reusing(task, 0.5)]).search.held_out_psnr_db
    assert "given 1" in names
    assert any(name.startswith("given 1's gates, slope") for name in names)


def test_a_start_that_costs_too_much_is_thinned_out(task, found):
    large, small = sweep(task, JUDGE.changed(budget=[0.3, 0.6]), starts=[found])
    assert "given 1" in large.search.held_out_psnr_db
    names = small.search.held_out_psnr_db
    assert "given 1" not in names
    assert any(name.startswith("given 1, thinned") for name in names)
    assert small.cost.ratio <= 0.3


def test_a_run_is_not_resumed_with_other_starts(task, found, tmp_path):
    search(task, JUDGE.changed(run_folder=tmp_path / "run"), starts=[found])
    search(task, JUDGE.changed(run_folder=tmp_path / "run", resume=True), starts=[found])
    other = replace(found, schedule=Schedule(np.ones_like(found.gates), found.schedule.backups))
    with pytest.raises(DipgoError, match="was begun with starts"):
        search(task, JUDGE.changed(run_folder=tmp_path / "run", resume=True), starts=[other])


def test_starts_that_do_not_fit_are_refused(task, found):
    name, backups = next(iter(found.schedule.backups)), found.schedule.backups
    wide = Schedule(found.gates, {**backups, name: np.zeros((STEPS, 2, 3), np.float32)})
    alone = Schedule(found.gates, {name: backups[name]})
    for other, config, starts, message in (
        (zoo.task("dit", STEPS, sites="block"), JUDGE, [found], "start 1 has other sites than this search"),
        (zoo.task("dit", 4), JUDGE, [found], "start 1 has 6 calls of the denoiser, this search 4"),
        (zoo.task("dit", STEPS, guidance=1.0), JUDGE, [found], "two passes of guidance, here it has one; .*--guidance"),
        (task, JUDGE.changed(history=1), [reusing(task, 0.5), found], "start 2 combines 2 outputs; .* --set history=2"),
        (task, JUDGE.changed(method="paper"), [found], "starts are for --method dipgo"),
        (task, JUDGE, [replace(found, schedule=wide)], "has 3 channels, here it has"),
        (task, JUDGE, [replace(found, schedule=alone)], "is an output of one model alone"),
    ):
        with misused(message):
            search(other, config, starts=starts)
