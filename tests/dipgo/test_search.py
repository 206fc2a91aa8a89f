"""The search: budgets are met, dependencies respected, and what is returned is the best on held-out noise."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dipgo.graph.liveness import canonical
from dipgo.schedule.fixed_schedules import SPACINGS, computed_steps, extrapolation, fixed_schedules
from dipgo.schedule.gates_at_budget import gates_at_budget
from dipgo.schedule.schedule import Schedule, backup_name
from dipgo.searching.backup_fit import Backups, learn_backups
from dipgo.searching.config import SearchConfig
from dipgo.searching.gate_training import dependent_shares
from dipgo.searching.judge import Judge
from dipgo.searching.losses import final_latent, psnr
from dipgo.searching.pruner import Pruner, straight_through
from dipgo.searching.run_folder import Run
from dipgo.searching.search import search
from dipgo.searching.task import Choices
from dipgo.searching.training_loop import Descent, Training
from tests import zoo
from tests.checks import misused

STEPS = 8
TINY = zoo.search_config(STEPS)


@pytest.fixture(scope="module")
def found(task):
    return search(task, TINY)


def any_fixed(task, number):
    return list(fixed_schedules(task.trace.macs, STEPS, 0.5).values())[number]


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**31), budget=st.floats(0.3, 1))
def test_post_processing_meets_the_budget(task, blocks, seed, budget):
    for traced in (task.trace, blocks):
        scores = np.random.default_rng(seed).random((STEPS, len(traced.sites)))
        gates = gates_at_budget(traced.macs, scores, budget)
        share = Schedule(gates).share(traced.macs)
        assert share <= budget
        assert gates[0].all()
        assert np.array_equal(gates, canonical(gates, 1, traced.live_sites)), "nothing is computed for nobody"
    assert share >= budget - 2 * max(site.macs for site in blocks.sites) / (blocks.macs.full * STEPS)


def test_fixed_schedules_meet_the_budget_and_are_all_different(task, blocks):
    for budget, traced in itertools.product((0.3, 0.5, 0.8), (task.trace, blocks)):
        fixed = fixed_schedules(traced.macs, STEPS, budget)
        assert len({(schedule.gates.tobytes(), schedule.history) for schedule in fixed.values()}) == len(fixed)
        for name, schedule in fixed.items():
            assert budget - 1 / STEPS <= schedule.share(traced.macs) <= budget, name
            assert schedule.gates[0].all()
    every_second = np.zeros((STEPS, len(task.trace.sites)), bool)
    every_second[::2] = True
    plain = fixed_schedules(task.trace.macs, STEPS, 0.5)["uniform reuse, whole, plain"]
    assert np.array_equal(plain.gates, every_second)


@pytest.mark.parametrize("name", SPACINGS)
def test_spacing(name):
    gaps = np.diff([*computed_steps(20, 5, name), 20])
    dense = {"uniform": [0, 1, 2, 3, 4], "late": [4], "early": [0, 1, 2], "middle": [2]}[name]
    assert list(np.flatnonzero(gaps == gaps.min())) == dense
    for count in range(1, 21):
        steps = computed_steps(20, count, name)
        assert steps[0] == 0
        assert len(set(steps)) == count
        assert steps == sorted(steps)
        assert steps[-1] < 20


def test_extrapolation_is_exact_on_straight_lines(task):
    gates = np.random.default_rng(0).random((STEPS, len(task.trace.sites))) < 0.5
    gates[:2] = True
    table = extrapolation(task.trace, gates).backups
    line = 3.0 * np.arange(STEPS) - 5
    for index, site in enumerate(task.trace.sites):
        for step in np.flatnonzero(~gates[:, index]):
            past = np.flatnonzero(gates[:step, index])[::-1][:2]
            assert table[backup_name(site.name)][step] @ line[past] == pytest.approx(line[step])


def test_extrapolation_without_slope_is_reuse(task):
    gates = any_fixed(task, 0).gates
    batch = task.sampling.draw(2, 0)
    flat = extrapolation(task.trace, gates, slope=0).tensors()
    half, full = (extrapolation(task.trace, gates, slope).backups for slope in (0.5, 1.0))
    with torch.no_grad():
        served = task.trajectory.gated(batch.noise, batch.conditions, gates, flat)
        reused = task.trajectory.gated(batch.noise, batch.conditions, gates, {})
    assert torch.allclose(served[-1], reused[-1], atol=1e-6)
    for name, array in half.items():
        assert np.allclose(array, (flat[name].numpy() + full[name]) / 2)


@pytest.mark.parametrize("by_pass", [True, False])
@pytest.mark.parametrize("by_channel", [True, False])
def test_backups_learn_a_gain_and_a_slope_that_leaves_what_stands_still(task, by_channel, by_pass):
    backups = Backups(task.trace, Schedule(any_fixed(task, 1).gates), 2, by_channel, by_pass)
    start = {name: weights.detach() for name, weights in backups().items()}

    def moved(term):
        with torch.no_grad():
            for parameter in backups.parameters():
                parameter.zero_()[:, term] = 0.1
        return {name: (weights - start[name]).detach() for name, weights in backups().items()}

    gain, slope = moved(0), moved(1)
    assert any(change.abs().max() > 0 for change in slope.values())
    for name in start:
        assert not gain[name][:, 1].any()
        assert torch.allclose(slope[name].sum(dim=1), torch.zeros(()), atol=1e-6)
        unused = (start[name][:, 1] == 0).flatten(1).all(dim=1)
        assert not slope[name][unused].any(), "two outputs must have been computed"


def test_backups_start_as_extrapolation_and_follow_the_loss_down(task):
    gates = any_fixed(task, 1).gates
    backups = Backups(task.trace, Schedule(gates))
    flatter = extrapolation(task.trace, gates, slope=0.25)
    for start, begun in (
        (extrapolation(task.trace, gates), backups.schedule()),
        (flatter, Backups(task.trace, flatter).schedule()),
    ):
        for name, array in begun.backups.items():
            assert np.allclose(array, start.backups[name][:, :, None, None] * np.ones_like(array))
    batch = task.sampling.draw(4, 0)
    target = task.trajectory.full(batch.noise, batch.conditions)

    def loss():
        with torch.no_grad():
            latents = task.trajectory.gated(batch.noise, batch.conditions, gates, backups())
            return final_latent(latents, target).item()

    before = loss()
    descent, phase = Descent(20, 2e-2), Run().phase("backups")
    learn_backups(backups, Training(task.trajectory, [(batch, target)] * 20, final_latent, descent, phase))
    assert loss() < 0.8 * before


def test_gradient_reaches_every_parameter_of_the_pruner():
    """In the public code the attention is a no-op and its parameters get no gradient."""
    torch.manual_seed(0)
    for attention in ("step", "site", "both"):
        pruner = Pruner(4, 3, width=16, hidden=8, layers=2, attention=attention)
        assert torch.equal(pruner() > 0.5, torch.ones(4, 3, dtype=torch.bool)), "keep everything at the start"
        optimiser = torch.optim.SGD(pruner.parameters(), lr=0.5)
        target = torch.rand(4, 3)
        for _ in range(2):  # the last layer starts at zero: behind it gradient flows from the second step on
            optimiser.zero_grad()
            ((straight_through(pruner(), (pruner() > 0.5).float()) - target) ** 2).sum().backward()
            optimiser.step()
        for name, parameter in pruner.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


def test_shares_count_dependents(blocks):
    shares = dict(zip((site.name for site in blocks.sites), dependent_shares(blocks.macs).tolist(), strict=True))
    own = {site.name: site.macs / blocks.macs.full for site in blocks.sites}
    assert shares["up_blocks.2"] > 0.95, "everything feeds the last block"
    assert shares["down_blocks.1"] >= own["down_blocks.1"]
    assert shares["up_blocks.1"] == pytest.approx(
        sum(own[name] for name in ("down_blocks.1", "down_blocks.2", "mid_block", "up_blocks.0", "up_blocks.1")),
        abs=0.02,
    )


def test_search_returns_the_best_candidate(task, found):
    paper = search(task, TINY.changed(method="paper"))
    for subnet in (found, paper):
        assert subnet.search.psnr_db == max(subnet.search.held_out_psnr_db.values())
        assert 0.4 <= subnet.cost.ratio <= 0.5
        assert subnet.gates[0].all()
    assert not paper.schedule.learned


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))])
def test_learning_begins_no_worse_than_the_fixed_schedule_of_the_same_gates(task, seed):
    one_noise = {"held_out": 8, "drops": 0, "drops_on": 1, "contenders": 40, "trial_iterations": 0}
    config = SearchConfig(steps=STEPS, budget=0.5, seed=seed, backup_iterations=0, **one_noise)
    judged = search(task, config).search.held_out_psnr_db
    begun = {name: db for name, db in judged.items() if ", slope" in name}
    assert begun
    assert [name for name, db in begun.items() if db < judged[name.rsplit(", slope", 1)[0]] - 2e-3] == []


def test_a_subnet_says_what_it_was_searched_on(task, found):
    config = TINY.changed(contenders=1, trial_iterations=0, backup_iterations=0, drops=0)
    other = search(zoo.task("dit", STEPS, choices=Choices(classes="1")), config)
    start = search(task, config, starts=[found])
    choices = found.search.choices
    assert choices["count"] == len(task.sampling.choices)
    assert start.search.choices == choices != other.search.choices
    assert (len(found.search.starts), len(start.search.starts)) == (0, 1)
    assert found.search.processes == 1


def test_what_is_judged_at_once_does_not_matter(task):
    gates = np.ones((STEPS, len(task.trace.sites)), bool)
    gates[1::2] = False
    whole, parts = (Judge(task, 5, 1, Run(), chunk).psnrs(Schedule(gates)) for chunk in (5, 2))
    assert whole.shape == (5,)
    assert whole == pytest.approx(parts, abs=1e-3)
    assert np.ptp(whole) > 0.1, "so that an order that was lost would show"
    black, grey = torch.full((1, 1, 4, 4), -1.0), torch.full((1, 1, 4, 4), -0.8)
    both = psnr(torch.cat([grey, black]), torch.cat([black, black]))
    assert both.tolist() == pytest.approx([20.0, 70.0], abs=1e-4)


def test_step_weights_are_one_a_call():
    with misused("2 step weights for 4 calls"):
        search(zoo.task("dit", 4), SearchConfig(steps=4, budget=0.5, step_weights=(1.0, 1.0)))


def test_searches_are_reproducible(task, found):
    again = search(task, TINY)
    assert np.array_equal(again.gates, found.gates)
    assert again.search.held_out_psnr_db == found.search.held_out_psnr_db
    for name, array in again.schedule.backups.items():
        assert np.array_equal(array, found.schedule.backups[name])
