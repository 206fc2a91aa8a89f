"""Choosing sites by pattern."""

import pytest

from dipgo.errors import DipgoError, UsageError
from dipgo.models import find_model
from dipgo.sites import site_names
from dipgo.trace import trace
from tests.models import tiny_unet


@pytest.fixture(scope="module")
def unet(tmp_path_factory):
    return tiny_unet(tmp_path_factory.mktemp("unet"))


def names(model, spec):
    return site_names(model.empty_denoiser(), model.family, spec)


def test_granularities(tiny_dit, unet):
    dit = find_model(tiny_dit)
    assert names(dit, "block") == ["transformer_blocks.0", "transformer_blocks.1"]
    layers = [f"transformer_blocks.{k}.{part}" for k in (0, 1) for part in ("attn1", "ff")]
    assert names(dit, None) == [*layers, "proj_out_2"]
    assert names(unet, None) == [
        *(f"down_blocks.{k}" for k in range(3)),
        *(f"up_blocks.{k}" for k in range(3)),
        "mid_block",
    ]


def test_patterns_match_one_part_of_a_name(unet):
    assert names(unet, "up_blocks.*.resnets.1, mid_block") == [
        *(f"up_blocks.{k}.resnets.1" for k in range(3)),
        "mid_block",
    ]


def test_wrong_patterns_are_refused(unet):
    with pytest.raises(UsageError, match=r"'blocks\.\*' matches no module of UNet2DConditionModel; use one of block"):
        names(unet, "blocks.*")
    with pytest.raises(UsageError, match=r"'mid_block\.attentions\.0' lies inside site 'mid_block'"):
        names(unet, "mid_block,mid_block.attentions.*")


def test_modules_that_never_run_are_refused(tiny_dit):
    with pytest.raises(DipgoError, match="never runs"):
        trace(find_model(tiny_dit), "transformer_blocks.*.attn1.to_out", 4.0)  # a list of modules, never called itself
