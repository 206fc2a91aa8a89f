"""Costs and dependencies read from the traced graph, against independent counts."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dipgo.eager.gating import intercepting
from dipgo.graph.costs import check_budget
from dipgo.graph.exported import Tapped, _Exportable, export_tapped
from dipgo.graph.liveness import canonical, plan
from dipgo.graph.macs import call_macs, layer_macs
from dipgo.graph.trace import trace
from dipgo.model.models import Model, find_model
from tests import zoo
from tests.checks import misused, refused


@pytest.fixture(scope="module")
def dit():
    return zoo.trace("dit")


def index(traced, *names):
    return {[site.name for site in traced.sites].index(name) for name in names}


def row(traced, *skipped):
    gates = np.ones(len(traced.sites), bool)
    gates[list(index(traced, *skipped))] = False
    return gates


def test_macs_of_a_block_by_hand(dit):
    tokens, width = 64, 32
    attention = 4 * tokens * width * width + 2 * tokens * tokens * width
    feed_forward = 2 * tokens * width * 4 * width
    output = tokens * width * 4
    modulation = 256 * width + width * width + width * 2 * width  # of the output alone: it goes where the output goes
    assert [site.macs for site in dit.sites] == [attention, feed_forward] * 2 + [output + modulation]
    assert dit.macs.call(row(dit, "transformer_blocks.1.ff")) == dit.macs.full - feed_forward


def test_macs_by_layer_by_hand(dit):
    """No attention products; biases once an output feature, and before each site a normalisation, twice an element."""
    tokens, width = 64, 32
    norm = 2 * tokens * width
    attention = 4 * (tokens * width * width + width)
    feed_forward = 2 * tokens * width * 4 * width + 4 * width + width
    modulation = (256 + 1) * width + (width + 1) * width + (width + 1) * 2 * width
    output = tokens * width * 4 + 4 + modulation
    expected = [attention + norm, feed_forward + norm] * 2 + [output + norm]
    assert list(layer_macs(dit).sites) == expected
    assert dit.macs.full == call_macs(dit.model, dit.model.empty_denoiser()), "as in a run on meta tensors"


def test_macs_under_gates_agree_with_a_gated_run(blocks):
    """Count a gated run of the real module; the skipped sites hand on what a full run produced."""
    torch.manual_seed(0)
    denoiser = blocks.model.empty_denoiser()
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    example = blocks.model.family.example(blocks.model.config, 1)
    names = [site.name for site in blocks.sites]
    served = {}

    def record(site, compute):
        served[site] = compute()
        return served[site]

    def call():
        blocks.model.family.call(denoiser, torch.zeros(blocks.model.latent_shape(1)), torch.ones(1), example)

    with torch.no_grad(), intercepting(denoiser, names, record):
        call()
    gates = row(blocks, "down_blocks.1", "mid_block", "up_blocks.0")
    with (
        torch.no_grad(),
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        intercepting(denoiser, names, lambda site, compute: compute() if gates[site] else served[site]),
        FlopCounterMode(display=False) as counter,
    ):
        call()
    # the gated run still computes down_blocks.2, which nobody reads: the graph knows, Python does not
    assert blocks.macs.call(gates) == counter.get_total_flops() // 2
    assert canonical(np.stack([row(blocks), gates]), 1, blocks.live_sites)[1].sum() < gates.sum()


def test_dependents_of_a_skipped_block_are_dead(blocks, dit):
    skipped = row(blocks, "up_blocks.2")
    assert blocks.live_sites(skipped) == index(blocks, "up_blocks.2")
    assert not blocks.reads_input(skipped), "conv_norm_out and conv_out alone read neither latent nor timestep"
    live = blocks.live_sites(row(blocks, "up_blocks.1"))
    assert live == index(blocks, "up_blocks.1", "up_blocks.2", "down_blocks.0")
    inside, output = np.zeros(len(dit.sites), bool), dit.output_sites()
    assert [dit.sites[site].name for site in output] == ["proj_out_2"]
    assert not dit.reads_input(inside), "the timestep is read until the output is skipped"
    inside[output] = True
    assert dit.reads_input(inside)
    gates = np.zeros((4, len(blocks.sites)), bool)
    gates[0] = True
    assert blocks.macs.trajectory(gates) == blocks.macs.full, "a silent step costs nothing"


def test_plan_stores_what_later_steps_read_and_no_more(blocks):
    count = len(blocks.sites)
    gates = np.ones((5, count), bool)
    gates[2, list(index(blocks, "up_blocks.1"))] = False
    gates[4] = False
    plans = plan(gates, 1, blocks.live_sites)
    assert plans[1].stored == index(blocks, "up_blocks.1")
    assert plans[2].served == dict.fromkeys(index(blocks, "up_blocks.1"), (1,))
    assert plans[2].computed == index(blocks, "down_blocks.0", "up_blocks.2")
    assert plans[3].stored == index(blocks, "up_blocks.2")
    assert plans[4].computed == frozenset()
    assert all(not plans[step].stored for step in (0, 2, 4))


def test_plan_reads_the_last_k_computed_outputs(dit):
    gates = np.ones((6, len(dit.sites)), bool)
    gates[[2, 4, 5], 1] = False
    plans = plan(gates, 2, dit.live_sites)
    assert plans[2].served == {1: (1, 0)}
    assert plans[5].served == {1: (3, 1)}
    assert [1 in entry.stored for entry in plans] == [True, True, False, True, False, False]


def test_budget_limits(dit):
    for budget in (0.0, -1.0, 1.01, float("nan")):
        with misused("outside"):
            check_budget(dit.macs, budget, 10)
    with misused("what step 0 and the ungated parts alone cost at 10 steps; give at least"):
        check_budget(dit.macs, 0.05, 10)
    check_budget(dit.macs, 0.3, 10)


def test_half_keeps_costs_and_casts_at_the_border(dit):
    half = zoo.trace("dit", dtype=torch.float16)
    assert half.dtype == torch.float16
    assert half.sites == dit.sites
    nodes = half.program.graph_module.graph.nodes
    values = {node.name: getattr(node.meta.get("val"), "dtype", None) for node in nodes}
    assert values[half.epsilon] == torch.float32
    assert {values[name] for names in half.outputs for name in names} == {torch.float16}
    latent, timestep, *_ = half.program.graph_signature.user_inputs
    assert values[latent] == values[timestep] == torch.float32


class _Branching(torch.nn.Module):
    """A denoiser whose second block decides by the values of its input; ``inner`` runs in one branch alone."""

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Conv2d(4, 4, 1)

        def forward(self, x):
            if x.sum() > 0:
                x = self.inner(x)
            return x

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.Conv2d(4, 4, 1), self.Block()])

    def forward(self, sample, timestep, class_labels, return_dict):
        for block in self.blocks:
            sample = block(sample)
        return (sample,)


class _BranchingModel(Model):
    def empty_denoiser(self, dtype=torch.float32):
        return _Branching().to(dtype)


@pytest.mark.parametrize("sites", ["blocks.0", "blocks.1.inner"])
def test_what_cannot_be_traced_is_named_with_its_line(tiny_dit, sites, capfd):
    whole = find_model(tiny_dit)
    model = _BranchingModel("branching", whole.folder, whole.family, whole.config)
    place = r"module 'blocks\.1' \(test_trace\.py:\d+, `if x\.sum\(\) > 0:`\)"
    with refused(rf"^torch\.export cannot trace _Branching: {place} goes by the values .*"):
        trace(model, sites, 1.0)
    assert capfd.readouterr() == ("", "")


class Parts(torch.nn.Module):
    """A denoiser with a site that hands out a word beside its tensor."""

    def __init__(self):
        super().__init__()
        self.denoiser = torch.nn.Sequential(torch.nn.Linear(4, 4))
        self.denoiser.add_module("pair", Pair())

    def forward(self, latent, timestep, conditions):
        return self.denoiser.pair(self.denoiser[0](latent))[0]


class Pair(torch.nn.Module):
    def forward(self, value):
        return value * 2, "doubled"


def test_a_site_that_hands_out_more_than_tensors_is_refused_by_its_name():
    example = (torch.zeros(3, 4), torch.ones(3), {})
    with refused("site 'pair' hands on a str beside tensors, which is not supported"):
        export_tapped(Tapped(Parts(), ["pair"]), example, ({}, {}, {}))


def test_what_no_graph_is_made_of_is_said_in_another_way():
    def computed():
        masks = torch.zeros(2, 3, 4)
        masks[0, :2, 1:].fill_diagonal_(2.0)
        masks[1].fill_diagonal_(-1.0)
        places, factors = torch.arange(3.0), torch.arange(4.0).double()
        return masks, torch.einsum("n,d->nd", places, factors), torch.arange(3).repeat_interleave(2, output_size=6)

    with _Exportable():
        others = computed()
    assert all(
        torch.equal(one, other) and one.dtype == other.dtype for one, other in zip(computed(), others, strict=True)
    )
