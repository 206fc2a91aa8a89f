"""Choosing sites by pattern."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dipgo.graph.sites import site_names
from dipgo.graph.trace import trace
from dipgo.model.models import find_model
from tests import zoo
from tests.checks import misused, refused


@pytest.fixture(scope="module")
def unet():
    return zoo.model("sd")


def names(model, spec):
    return site_names(model.empty_denoiser(), model.family, spec)


def test_granularities(tiny_dit, unet):
    dit = find_model(tiny_dit)
    assert names(dit, "block") == ["transformer_blocks.0", "transformer_blocks.1"]
    layers = [f"transformer_blocks.{k}.{part}" for k in (0, 1) for part in ("attn1", "ff")]
    assert names(dit, None) == [*layers, "proj_out_2"]
    assert names(unet, None) == [*(f"{way}_blocks.{k}" for way in ("down", "up") for k in range(3)), "mid_block"]


# Blocks: down + mid + up. Branches: resnets outside the mid block, one mid block, samplers. Layers: resnets, samplers,
# three for each transformer block, and the output.
COUNTS = {
    "sd-1.5": (4 + 1 + 4, (8 + 12) + 1 + 6, (8 + 2 + 12) + 6 + 3 * (6 + 1 + 9) + 1),
    "sd-2.1": (4 + 1 + 4, (8 + 12) + 1 + 6, (8 + 2 + 12) + 6 + 3 * (6 + 1 + 9) + 1),
    "sdxl": (3 + 1 + 3, (6 + 9) + 1 + 4, (6 + 2 + 9) + 4 + 3 * (2 * 2 + 2 * 10 + 10 + 3 * 10 + 3 * 2) + 1),
    "dit-xl-2": (28, 28, 28 * 2 + 1),
    "pixart-alpha": (28, 28, 28 * 3 + 1),
}


@pytest.mark.parametrize("name", COUNTS)
def test_granularities_of_the_true_architectures(name):
    model = find_model(name)
    assert tuple(len(names(model, spec)) for spec in ("block", "branch", "layer")) == COUNTS[name]


PARTS = ("resnets", "attentions")


def test_a_branch_is_a_resnet_with_its_transformer(unet):
    """What the sites of a block save apart is what the block saves as one, resnets included."""
    blocks, branches = (zoo.trace("sd", sites, 1.0) for sites in ("block", "branch"))
    listed = [site.name for site in branches.sites]
    assert "down_blocks.0.attentions.0" in listed
    assert "down_blocks.0.resnets.0" not in listed
    assert "down_blocks.2.resnets.0" in listed
    for block in blocks.sites:
        parts = [site for site in branches.sites if f"{site.name}.".startswith(f"{block.name}.")]
        assert sum(site.macs for site in parts) == block.macs
        assert sum(site.params for site in parts) == block.params
    row = np.ones(len(listed), bool)
    row[listed.index("up_blocks.1.attentions.0")] = False
    denoiser, example = unet.empty_denoiser(), unet.family.example(unet.config, 1)
    attention = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with torch.no_grad(), attention, FlopCounterMode(display=False) as counter:
        unet.family.call(denoiser, torch.zeros(unet.latent_shape(1)), torch.ones(1), example)
    flops = {part: counter.get_flop_counts()[f"UNet2DConditionModel.up_blocks.1.{part}.0"] for part in PARTS}
    assert branches.macs.full - branches.macs.call(row) == sum(sum(part.values()) for part in flops.values()) // 2


def test_patterns_match_one_part_of_a_name_and_choose_the_first_alternative_that_exists(unet):
    first = [f"down_blocks.{k}.{part}.0" for k, part in enumerate(("attentions", "attentions", "resnets"))]
    assert names(unet, "down_blocks.*.attentions|resnets.0") == first
    assert names(unet, "*_blocks.0.*samplers.*") == ["down_blocks.0.downsamplers.0", "up_blocks.0.upsamplers.0"]
    resnets = [f"up_blocks.{k}.resnets.1" for k in range(3)]
    assert names(unet, "up_blocks.*.resnets.1, mid_block") == [*resnets, "mid_block"]


def test_wrong_patterns_are_refused(tiny_dit, unet):
    with misused(r"'blocks\.\*' matches no module of UNet2DConditionModel; use one of block"):
        names(unet, "blocks.*")
    with misused(r"'mid_block\.attentions\.0' lies inside site 'mid_block'"):
        names(unet, "mid_block,mid_block.attentions.*")
    with refused("never runs"):
        trace(find_model(tiny_dit), "transformer_blocks.*.attn1.to_out", 4.0)  # a list of modules, never called itself
