"""The solver table against the real schedulers."""

import json

import diffusers
import numpy as np
import pytest
import torch

from dipgo.base.errors import UsageError
from dipgo.model.sampler import ALIASES, SchedulerConfig, make_scheduler, tabulate
from tests.checks import misused

BASE = diffusers.DDIMScheduler(beta_schedule="linear", clip_sample=False)
DRAW = ("ddpm", "dpm++2m-sde", "euler-a", "lcm")
V_PREDICTION = diffusers.DDIMScheduler(
    beta_schedule="scaled_linear", clip_sample=False, prediction_type="v_prediction", steps_offset=1
)


@pytest.mark.parametrize("name", sorted(ALIASES))
@pytest.mark.parametrize("steps", [2, 7, 20])
@pytest.mark.parametrize("base", [BASE, V_PREDICTION], ids=["epsilon", "v"])
def test_table_equals_scheduler(name, steps, base):
    scheduler = make_scheduler(name, base)
    assert scheduler.config.prediction_type == base.config.prediction_type
    sampler = tabulate(scheduler, steps)
    generator = torch.Generator().manual_seed(steps)
    noise, *outputs = torch.randn(sampler.calls + 1, 2, 4, 8, 8, generator=generator)
    state = generator.get_state()
    drawn = [torch.randn(noise.shape, generator=generator) for _ in range(sampler.draws)]
    options = {"generator": generator.set_state(state)} if drawn else {}
    assert bool(drawn) == (name in DRAW)

    scheduler.set_timesteps(steps)
    latent = noise * float(scheduler.init_noise_sigma)
    basis = torch.stack([noise, *drawn, *outputs]).double()
    for call, timestep in enumerate(scheduler.timesteps):
        expected = np.einsum("k,k...->...", sampler.rows[call], basis) * sampler.input_scale[call]
        actual = scheduler.scale_model_input(latent, timestep)
        assert torch.linalg.norm(actual - torch.from_numpy(expected)) <= 1e-4 * torch.linalg.norm(actual)
        latent = scheduler.step(outputs[call], timestep, latent, **options).prev_sample
    final = torch.from_numpy(np.einsum("k,k...->...", sampler.rows[-1], basis))
    assert torch.linalg.norm(latent - final) <= 1e-4 * torch.linalg.norm(latent)


@pytest.mark.parametrize("name", sorted(name for name in dir(diffusers) if name.endswith("Scheduler")))
def test_every_scheduler_of_diffusers_is_a_table_or_refused_in_one_line(name):
    """Flow matching, other arguments to ``step`` or to the constructor, packages that are not installed."""
    try:
        assert tabulate(make_scheduler(name, BASE), 5).calls >= (4 if name == "MiniMaxH3Scheduler" else 5)
    except UsageError as error:
        text = str(error)
        assert name in text
        assert "\n" not in text
        assert len(text) < 400


def test_timesteps_are_the_scheduler_s():
    sampler, scheduler = (tabulate(make_scheduler("pndm", BASE), 5), make_scheduler("pndm", BASE))
    scheduler.set_timesteps(5)
    assert list(sampler.timesteps) == scheduler.timesteps.tolist()
    assert sampler.calls == 6


class Wanders(diffusers.EulerDiscreteScheduler):
    """Draws from torch's global generator, which no call sets."""

    def step(self, output, timestep, sample):
        moved = super().step(output, timestep, sample)
        moved.prev_sample += torch.randn_like(sample)
        return moved


def test_what_is_not_linear_or_makes_no_sense_is_refused():
    euler = make_scheduler("euler", BASE)
    assert tabulate(euler, 10).calls == 10
    ancestral = diffusers.EulerAncestralDiscreteScheduler()
    clips = "not linear as configured: it clips or thresholds"
    for call, message in (
        (lambda: tabulate(ancestral, 20, given={}), "AncestralDiscreteScheduler draws noise, and this pipeline gives"),
        (lambda: tabulate(Wanders(), 20), "Wanders draws noise in a way of its own, not from a generator"),
        (lambda: tabulate(diffusers.DDIMScheduler(clip_sample=True), 20), clips),
        (lambda: tabulate(diffusers.DDPMScheduler(clip_sample=True), 20), clips),
        (lambda: tabulate(diffusers.DPMSolverMultistepScheduler(thresholding=True), 20), clips),
        (lambda: tabulate(diffusers.UniPCMultistepScheduler(predict_x0=False), 20), "not finite as configured"),
        (lambda: tabulate(diffusers.DDIMScheduler(num_train_timesteps=10), 20), "DDIMScheduler refuses 20 steps"),
        (lambda: tabulate(BASE, 1), "at least 2"),
        (lambda: make_scheduler("dimm", BASE), r"unknown sampler 'dimm'; use ddim"),
        (lambda: tabulate(euler, 10, scales_noise=False), "scaled noise"),  # which the pipeline forgets
    ):
        with misused(message):
            call()


def test_a_scheduler_s_own_reason_is_kept():
    for config, message in (
        ({"num_train_timesteps": -5}, "cannot be made of the pipeline's configuration"),
        ({"beta_schedule": "mine"}, "mine is not implemented"),
        ({"algorithm_type": "dpmsolver"}, "`algorithm_type` dpmsolver"),
        ({"trained_betas": "many"}, "cannot be made of the pipeline's configuration"),
    ):
        with misused(message):
            tabulate(make_scheduler(None, SchedulerConfig("DPMSolverMultistepScheduler", config)), 20)


def test_a_scheduler_without_its_package_gives_way_to_another():
    """DPMSolverSDEScheduler needs torchsde, which nothing here does."""
    base = SchedulerConfig("DPMSolverSDEScheduler", dict(BASE.config))
    with misused(r"sampler 'DPMSolverSDEScheduler' cannot be made .*torchsde"):
        make_scheduler(None, base)
    assert tabulate(make_scheduler("ddim", base), 5).calls == 5


@pytest.mark.parametrize("name", ["ddim", "DDIMScheduler"])
def test_ddim_clips_only_where_the_pipeline_does(name):
    """Its default is to; a pipeline made for DPM-Solver++ says nothing of it."""
    plain = make_scheduler(name, diffusers.DPMSolverMultistepScheduler())
    assert not plain.config.clip_sample
    assert tabulate(plain, 5).calls == 5
    with misused("not linear"):
        tabulate(make_scheduler(name, diffusers.DDIMScheduler(clip_sample=True)), 5)


@pytest.mark.parametrize("name", sorted(ALIASES))
def test_the_recorded_configuration_restores_the_scheduler(name):
    scheduler = make_scheduler(name, BASE)
    sampler = tabulate(scheduler, 5)
    config = json.loads(json.dumps(sampler.config, allow_nan=False))
    restored = tabulate(getattr(diffusers, sampler.name).from_config(config), 5)
    assert np.array_equal(restored.rows, sampler.rows)
    assert restored.timesteps == sampler.timesteps
