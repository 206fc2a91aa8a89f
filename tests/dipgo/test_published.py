"""The SD-1.5 SubNet that DiP-GO published: reproduced on the true architecture, and what it does under DDIM."""

import json
import pickle
from importlib import resources

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import nn

from dipgo.eager.trajectory import Trajectory
from dipgo.graph.macs import layer_macs
from dipgo.graph.trace import trace
from dipgo.importers.importer import apply, read_schedule, summary
from dipgo.model.families import FAMILIES, GuidedDenoiser
from dipgo.model.models import find_model
from dipgo.model.sampler import tabulate
from dipgo.schedule.describe import subnet_text
from dipgo.schedule.subnet import load_subnet
from dipgo.searching.memory import Iteration, memory_estimate

COMPUTED = [0, 7, 13, 19, 20, 21, 26, 32, 39, 48]  # steps; step 7 all but down_blocks.3
TIMESTEPS = [981, 841, 721, 601, 581, 561, 461, 341, 201, 21]
DOWN, MID, UP = (32.9392, 31.3169, 31.4594, 3.7791), 6.0285, (12.9049, 75.1374, 79.1231, 66.0427)  # GMACs
PAPER = {("down", "block", k, 0): (f"down_blocks.{k}", macs) for k, macs in enumerate(DOWN)}  # by published keys
PAPER |= {("mid", "mid_block", 0, 0): ("mid_block", MID)}
PAPER |= {("up", "block", 3 - k, 0): (f"up_blocks.{k}", macs) for k, macs in enumerate(UP)}


@pytest.fixture(scope="session")
def sd15():
    return trace(find_model("sd-1.5"), "block", 7.5)


@pytest.fixture(scope="module")
def published():
    return load_subnet(resources.files("dipgo") / "published" / "sd15-published-0.8.json")


def sd15_ddim(steps=50):
    own = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, **own)
    return scheduler, tabulate(scheduler, steps)


def test_the_facts_of_the_published_subnet(published):
    names = [site.name for site in published.sites]
    expected = np.zeros((50, 9), bool)
    expected[COMPUTED] = True
    expected[7, names.index("down_blocks.3")] = False
    assert np.array_equal(published.gates, expected)
    assert published.model == find_model("sd-1.5").identity()
    assert published.model.weights_sha256 is None
    assert (published.sampler.class_name, published.sampler.guidance_scale) == ("DDIMScheduler", 7.5)
    assert published.sampler.timesteps == list(range(981, 0, -20))
    text = subnet_text(published)
    assert "89 of 450 computed, 3 signatures, 40 steps compute no site" in text
    assert "89 of 450 gates, 3 signatures, 40 empty steps" in summary(published)
    assert "20.00% of 338.83 G a call as published" in summary(published)


@pytest.mark.parametrize("form", ["pickle", pytest.param("fact sheet", marks=pytest.mark.slow)])
def test_importing_what_was_published_gives_the_shipped_subnet(form, published, sd15, tmp_path):
    """The pickle is built with torch, as the public code builds it."""
    keep = np.array([[step in COMPUTED for _ in PAPER] for step in range(50)])
    keep[7, 3] = False
    if form == "pickle":
        one_hot = torch.eye(2)
        steps = [dict(zip(PAPER, (one_hot[int(gate)].clone() for gate in row), strict=True)) for row in keep]
        content = pickle.dumps(steps)
    else:
        sheet = {"block_order": ["/".join(map(str, key)) for key in PAPER], "keep": keep.astype(int).tolist()}
        content = json.dumps(sheet).encode()
    path = tmp_path / "sd15_gates_0.8"
    path.write_bytes(content)
    schedule = read_schedule(path)
    assert (schedule.model, schedule.sampler, schedule.steps) == ("sd-1.5", "ddim", 50)
    subnet = apply(schedule, sd15, sd15_ddim()[1])
    assert np.array_equal(subnet.gates, published.gates)
    for part in ("model", "sites", "cost"):
        assert getattr(subnet, part) == getattr(published, part)
    assert subnet.sampler.timesteps == published.sampler.timesteps
    assert subnet.search.published_macs == published.search.published_macs


def test_macs_agree_with_the_paper_s_table_to_its_last_digit(sd15, published):
    """Counted by layer, without attention products, biases and normalisations included."""
    denoiser = sd15.model.empty_denoiser()
    assert round(sum(parameter.numel() for parameter in denoiser.parameters()) / 1e6, 2) == 859.52
    layers, names = layer_macs(sd15), [site.name for site in sd15.sites]
    rounded = [round(macs / 1e9, 4) for macs in layers.sites]
    assert dict(zip(names, rounded, strict=True)) == dict(PAPER.values())
    assert round(layers.full / 1e9, 4) == 338.8316
    assert round((layers.full - sum(layers.sites)) / 1e9, 4) == 0.1004

    macs = np.array([dict(PAPER.values())[name] for name in names])
    mean = 338.8316 - ((~published.gates) @ macs).mean()
    cost = published.search.published_macs
    assert cost.subnet / 50 / 1e9 == pytest.approx(mean, abs=1e-4)
    assert f"{cost.ratio:.2%}" == "20.00%"
    assert round(cost.full / 1e12, 2) == 16.94
    assert f"{published.cost.ratio:.2%}" == "19.98%"  # a step that computes nothing launches nothing


# Under DDIM: a UNet with SD-1.5's four levels, so that its nine blocks have the published names


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    config = {"block_out_channels": (8, 16, 16, 16), "cross_attention_dim": 24, "norm_num_groups": 4}
    unet = UNet2DConditionModel(sample_size=8, layers_per_block=2, attention_head_dim=2, **config)
    for parameter in unet.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return unet.double().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def start():
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float64)
    text = torch.randn(4, 77, 24, generator=generator, dtype=torch.float64)
    return noise, text


def ten_steps(unet: nn.Module, noise, text):
    """DDIM with eta 0 (Song et al. 2021, eq. 12) on ten timesteps of our choice; each ends where the next begins."""
    scheduler, _ = sd15_ddim()
    alphas = [scheduler.alphas_cumprod[t].double() for t in TIMESTEPS] + [scheduler.final_alpha_cumprod.double()]
    latent = noise
    for timestep, alpha, following in zip(TIMESTEPS, alphas, alphas[1:], strict=False):
        output = unet(torch.cat([latent, latent]), timestep, text, return_dict=False)[0]
        unconditional, conditional = output.chunk(2)
        noise_part = unconditional + 7.5 * (conditional - unconditional)
        clean = (latent - (1 - alpha).sqrt() * noise_part) / alpha.sqrt()
        latent = following.sqrt() * clean + (1 - following).sqrt() * noise_part
    return latent


def fifty_steps(unet, published, gates, noise, text):
    family = next(family for family in FAMILIES if family.denoiser_class == "UNet2DConditionModel")
    trajectory = Trajectory(GuidedDenoiser(unet, family, 7.5), published.sites, sd15_ddim()[1])
    with torch.no_grad():
        return trajectory.gated(noise, {"encoder_hidden_states": text}, gates, {})[-1]


def relative(actual, expected):
    return float(torch.linalg.norm(actual - expected) / torch.linalg.norm(expected))


def test_but_for_one_block_it_is_ddim_in_ten_steps(small, start, published):
    """That block is all that differs: ten-step DDIM whose second call is handed the first call's down_blocks.3."""
    expected, own = ten_steps(small, *start), fifty_steps(small, published, published.gates, *start)
    forced = published.gates.copy()
    forced[7] = True
    assert relative(fifty_steps(small, published, forced, *start), expected) < 1e-5
    assert relative(own, expected) > 1e-4
    seen = []

    def serve(module, args, output):
        seen.append(output)
        return seen[0] if len(seen) == 2 else output

    hook = small.down_blocks[3].register_forward_hook(serve)
    expected = ten_steps(small, *start)
    hook.remove()
    assert len(seen) == 10
    assert relative(own, expected) < 1e-5


@pytest.mark.slow
def test_a_search_on_it_fits_40_gb(sd15):
    """Block sites, 50 steps, 512x512, one image with guidance, a loss on the decoded image."""
    pruner = 37_852_676  # parameters of the public code's pruner for these 450 gates
    for precision in (None, torch.bfloat16):
        iteration = Iteration(precision=precision, loss="ssim+l1", learned=pruner, adam=True, pool=512)
        estimate = memory_estimate(sd15, 50, iteration)
        assert 10e9 < estimate.total < 20e9
        all_kept = memory_estimate(sd15, 50, Iteration(precision=precision, recompute=False))
        assert all_kept.total > 100e9, "which is why steps are recomputed"
