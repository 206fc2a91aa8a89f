"""Random weights: the same by name wherever they are drawn."""

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from torch import nn

from dipgo.base.dtypes import PRECISIONS, Dtype
from dipgo.model.random_weights import draw, randomise, write_random
from tests.checks import refused, small_disk

LARGE = (700, 3, 20, 20)  # more than three blocks


@pytest.mark.parametrize("shape", [LARGE, (2000, 500), (16, 4, 3, 3), (1, 7)])
def test_matrices_keep_the_size_of_what_they_multiply(shape):
    values = draw("conv.weight", shape)
    fan_in = values[0].numel()
    assert values.shape == shape
    assert values.dtype == torch.float32
    error = 5 / values.numel() ** 0.5  # five standard errors, roughly
    assert (values * fan_in**0.5).std(correction=0) == pytest.approx(1, abs=error) or values.numel() < 50
    assert abs((values * fan_in**0.5).mean()) < error
    assert values.unique().numel() > 0.9 * values.numel()  # nothing is repeated


def test_norms_biases_and_scalars_and_that_values_depend_on_the_name_alone():
    assert torch.equal(draw("norm.weight", [64]), torch.ones(64))
    assert draw("linear.bias", (10_000,)).std() == pytest.approx(0.02, rel=0.05)
    assert torch.equal(draw("scale", ()), torch.tensor(1.0))
    assert draw("nothing.weight", (0, 3)).shape == (0, 3)
    state = torch.random.get_rng_state()
    first = draw("a.weight", LARGE)
    assert torch.equal(draw("a.weight", LARGE), first)
    assert not torch.equal(draw("b.weight", LARGE), first)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("dtype", PRECISIONS.values())
def test_a_written_file_holds_what_is_drawn(tmp_path, dtype):
    parameters = {"b.weight": LARGE, "a.bias": (7,), "a.weight": (7,), "scale": (), "empty": (0, 2)}
    write_random(parameters, dtype, tmp_path / "deep" / "w.safetensors")
    written = load_file(tmp_path / "deep" / "w.safetensors")
    assert written.keys() == parameters.keys()
    for name, shape in parameters.items():
        assert written[name].dtype == dtype.torch
        assert torch.equal(written[name], draw(name, shape).to(dtype.torch))
    with (tmp_path / "deep" / "w.safetensors").open("rb") as stream:
        assert (8 + int.from_bytes(stream.read(8), "little")) % 64 == 0


def test_randomise_fills_a_module_that_holds_nothing():
    config = {"block_out_channels": (16, 16), "sample_size": 8, "cross_attention_dim": 8, "norm_num_groups": 4}
    config |= {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
    config |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "attention_head_dim": 4}
    with init_empty_weights(include_buffers=False):
        empty = UNet2DConditionModel(**config)
    full = UNet2DConditionModel(**config).half()
    for module in (empty, full):
        randomise(module)
    assert full.conv_in.weight.dtype == torch.float16
    assert full.conv_in.weight.requires_grad
    for (name, mine), other in zip(empty.named_parameters(), full.parameters(), strict=True):
        assert torch.equal(mine, draw(name, mine.shape))
        assert torch.equal(mine.half(), other)
    with torch.no_grad():
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        out = empty(noise, 500, torch.ones(1, 3, 8)).sample
    assert 0.05 < out.std() < 20  # signals neither die nor explode


def test_shared_parameters_stay_shared():
    module = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    module["b"].weight = module["a"].weight
    randomise(module)
    assert module["b"].weight is module["a"].weight
    assert torch.equal(module["a"].weight, draw("a.weight", (4, 4)))


def test_a_full_disk_leaves_nothing(tmp_path):
    with small_disk(1_000_000), refused(r"w\.safetensors: the disk is full"):
        write_random({"w": LARGE}, Dtype.FLOAT32, tmp_path / "w.safetensors")
    assert list(tmp_path.iterdir()) == []
