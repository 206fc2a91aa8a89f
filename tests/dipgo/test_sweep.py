"""Sweeps, contenders and proposals: what the procedure adds to its parts."""

import itertools
import json
import time

import numpy as np
import pytest
from PIL import Image

from dipgo.eager.drift import measure_drift
from dipgo.graph.liveness import canonical
from dipgo.schedule.fixed_schedules import EXTRAPOLATION, Rule, drifted, fixed_schedules, spaced, thinned
from dipgo.schedule.gates_at_budget import swept_gates
from dipgo.searching.greedy_prune import drop_cheapest
from dipgo.searching.pareto import write_pareto
from dipgo.searching.search import sweep
from tests import zoo

STEPS = 8
TINY = zoo.search_config(STEPS)


@pytest.fixture(scope="module")
def drift(task):
    return measure_drift(task.trajectory, task.sampling.draw(2, 0))


@pytest.fixture(scope="module")
def swept(task):
    return list(sweep(task, TINY.changed(budget=[0.4, 0.7])))


def share(traced, gates, learned=True):
    return traced.macs.trajectory(gates, learned) / (traced.macs.full * len(gates))


def too_much(traced, budget, spacing, serving):
    """Gates of one computed step more than the budget allows."""
    rule = Rule(spacing, serving, EXTRAPOLATION)
    return rule.gates(traced, STEPS, rule.whole_steps(traced.macs, STEPS, budget)[1])


def test_sweep_answers_from_the_largest_budget_on_and_meets_every_one(swept):
    assert [subnet.search.budget for subnet in swept] == [0.7, 0.4]
    for subnet in swept:
        assert subnet.search.psnr_db == max(subnet.search.held_out_psnr_db.values())
        assert subnet.cost.ratio <= subnet.search.budget
    names = " ".join(swept[1].search.held_out_psnr_db)
    assert "thinned" in names, "the smaller budget starts from the larger"
    assert "dropped, " in names
    assert "backups learned" in names


@pytest.mark.slow
def test_the_better_half_of_the_contenders_learns_on(task):
    config = TINY.changed(contenders=6, trial_iterations=2, backup_iterations=9)
    scores = next(sweep(task, config)).search.held_out_psnr_db
    rounds = [{name: db for name, db in scores.items() if name.endswith(f" {n} iterations")} for n in (4, 12, 18)]
    assert [len(judged) for judged in rounds] == [6, 3, 1]
    for before, after in itertools.pairwise(rounds):
        best = sorted(before, key=lambda name: -before[name])[: len(after)]
        assert {name.rsplit(",", 1)[0] for name in best} == {name.rsplit(",", 1)[0] for name in after}


def test_pareto_holds_every_budget(swept, tmp_path):
    write_pareto(swept, tmp_path)
    points = json.loads((tmp_path / "pareto.json").read_text())
    assert [point["macs_ratio"] for point in points] == sorted(subnet.cost.ratio for subnet in swept)
    assert all(point["psnr_db"] >= point["best_policy_psnr_db"] for point in points)
    with Image.open(tmp_path / "pareto.png") as image:
        assert image.size == (720, 480)


def test_paper_sweep_scores_once(task):
    calls = []
    config = TINY.changed(budget=[0.7, 0.4], method="paper", batch=1, held_out=2, loss="latent")

    def report(phase: str, *_rest: object) -> None:
        calls.append(phase)
        time.sleep(0.3)

    found = list(sweep(task, config, report))
    assert calls == ["gates", "gates"]
    assert not found[0].schedule.learned
    assert min(subnet.search.seconds for subnet in found) >= 0.6, "what gave the scores counts"
    assert found[1].cost.ratio <= 0.4


def test_drops_are_the_cheapest_per_mac(task):
    """Where every gate is worth what it is worth alone, what was dropped is cheaper than all that is left."""
    trace = task.trace
    above = too_much(trace, 0.4, "middle", "mixed")
    worth = np.random.default_rng(0).random(above.shape)
    found = drop_cheapest(trace.macs, above, 0.4, lambda gates: float(worth[gates].sum()), above.size, seed=0)
    assert share(trace, above) > 0.4 >= share(trace, found)
    assert np.array_equal(found, canonical(found, 2, trace.live_sites))
    price = worth / np.array([site.macs for site in trace.sites])
    price[0] = price[:, trace.output_sites()] = np.inf
    assert price[above & ~found].max() < price[found].min()


@pytest.mark.parametrize("singles", [1, 1000])
def test_drops_meet_the_budget_whatever_is_measured(blocks, singles):
    """On a UNet, where sites go with others that nobody reads any more; computation is worth more the later it is."""
    above = too_much(blocks, 0.5, "early", "inside")
    measured = []

    def late(gates):
        return float((gates * np.arange(STEPS)[:, None]).sum())

    found = drop_cheapest(blocks.macs, above, 0.5, late, singles, 0, lambda count, left: measured.append(left))
    assert share(blocks, above) > 0.5 >= share(blocks, found)
    assert not (found & ~above).any()
    assert found[0].all()
    assert measured[-1] <= measured[0]
    if singles > above.size:
        assert late(found) > late(spaced(blocks.macs, STEPS, 0.5, Rule("early", history=EXTRAPOLATION)).gates)


@pytest.mark.parametrize("sites", ["block", pytest.param("layer", marks=pytest.mark.slow)])
def test_searches_keep_a_budget_that_hardly_allows_one_step(tmp_path, sites):
    """By block the UNet's output site is dear, and what drops leave of a second step may cost too much."""
    task = zoo.task("sd", STEPS, "euler", sites)
    least = np.zeros((STEPS, len(task.trace.sites)), bool)
    least[0] = True
    budget = share(task.trace, least) + 0.001
    (found,) = sweep(task, TINY.changed(budget=budget, drops=100, trial_iterations=0, backup_iterations=0))
    assert found.cost.ratio <= budget


def test_drift_is_the_relative_change_between_steps(task, drift):
    """Against forward hooks on the denoiser itself."""
    batch = task.sampling.draw(2, 0)
    name = task.trace.sites[1].name
    seen = []
    module = task.trajectory.guided.denoiser.get_submodule(name)
    handle = module.register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    task.trajectory.full(batch.noise, batch.conditions)
    handle.remove()
    expected = [float((b - a).abs().sum() / a.abs().sum()) for a, b in itertools.pairwise(seen)]
    assert drift[0, 1] == 0
    assert np.allclose(drift[1:, 1], expected, rtol=1e-4)


def test_drifted_gates_compute_where_the_output_moves(task, drift):
    uneven = np.full_like(drift, 0.01)
    uneven[5:] = 1.0
    gates = drifted(task.trace.macs, uneven, 0.6)
    inner = [site for site in range(gates.shape[1]) if site not in task.trace.output_sites()]
    assert gates[5:, inner].sum() > gates[1:5, inner].sum()
    assert share(task.trace, drifted(task.trace.macs, drift, 0.6), False) <= 0.6


def test_thinned_gates_lie_within_the_larger_ones(task, drift):
    large = spaced(task.trace.macs, STEPS, 0.7, Rule(history=EXTRAPOLATION)).gates
    small = thinned(task.trace.macs, large, drift, 0.4)
    assert share(task.trace, small) <= 0.4
    inner = [site for site in range(small.shape[1]) if site not in task.trace.output_sites()]
    assert (small[:, inner] & ~large[:, inner]).sum() <= 0.1 * small.sum()


def test_deepcache_computes_its_outer_sites_in_every_step(task, blocks):
    for traced in (task.trace, blocks):
        order = traced.execution_order()
        gates = spaced(traced.macs, STEPS, 0.7, Rule(outer=1)).gates
        assert gates[:, [order[0], order[-1]]].all()
        assert not gates[:, order[1:-1]].all()
        assert "DeepCache-like, 1 outer" in fixed_schedules(traced.macs, STEPS, 0.7)
    assert [blocks.sites[site].name for site in (order[0], order[-1])] == ["down_blocks.0", "up_blocks.2"], (
        "its shortcut"
    )


def test_public_sweep_reproduces_the_published_shape(blocks):
    """With equal scores to skip, whole steps go first: the last block takes everything with it."""
    scores = np.full((10, len(blocks.sites)), 0.04)
    gates = swept_gates(blocks.macs, scores, 0.3)
    rows, counts = np.unique(gates[1:].sum(axis=1), return_counts=True)
    assert counts[rows == 0].sum() >= 6
    assert share(blocks, gates, False) <= 0.35
