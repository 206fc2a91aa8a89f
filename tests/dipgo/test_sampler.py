"""The solver table against the real schedulers."""

import json

import diffusers
import numpy as np
import pytest
import torch

from dipgo.base.errors import UsageError
from dipgo.model.sampler import ALIASES, SchedulerConfig, make_scheduler, tabulate

BASE = diffusers.DDIMScheduler(beta_schedule="linear", clip_sample=False)


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

    scheduler.set_timesteps(steps)
    latent = noise * float(scheduler.init_noise_sigma)
    basis = torch.stack([noise, *outputs]).double()
    for call, timestep in enumerate(scheduler.timesteps):
        expected = np.einsum("k,k...->...", sampler.rows[call], basis) * sampler.input_scale[call]
        actual = scheduler.scale_model_input(latent, timestep)
        assert torch.linalg.norm(actual - torch.from_numpy(expected)) <= 1e-4 * torch.linalg.norm(actual)
        latent = scheduler.step(outputs[call], timestep, latent).prev_sample
    final = torch.from_numpy(np.einsum("k,k...->...", sampler.rows[-1], basis))
    assert torch.linalg.norm(latent - final) <= 1e-4 * torch.linalg.norm(latent)


@pytest.mark.parametrize("name", sorted(name for name in dir(diffusers) if name.endswith("Scheduler")))
def test_every_scheduler_of_diffusers_is_a_table_or_refused_in_one_line(name):
    """Flow matching, other arguments to ``step`` or to the constructor, packages that are not installed."""
    try:
        assert tabulate(make_scheduler(name, BASE), 5).calls >= 5
    except UsageError as error:
        text = str(error)
        assert name in text
        assert "\n" not in text
        assert len(text) < 400


def test_timesteps_are_the_scheduler_s():
    sampler = tabulate(make_scheduler("pndm", BASE), 5)
    scheduler = make_scheduler("pndm", BASE)
    scheduler.set_timesteps(5)
    assert list(sampler.timesteps) == scheduler.timesteps.tolist()
    assert sampler.calls == 6


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (diffusers.DDPMScheduler(clip_sample=False), "DDPMScheduler draws noise at every step"),
        (diffusers.EulerAncestralDiscreteScheduler(), "EulerAncestralDiscreteScheduler draws noise at every step"),
        (diffusers.DDIMScheduler(clip_sample=True), "not linear as configured: it clips or thresholds"),
        (diffusers.DPMSolverMultistepScheduler(thresholding=True), "not linear as configured: it clips or thresholds"),
        (diffusers.UniPCMultistepScheduler(predict_x0=False), "values that are not finite as configured"),
        (diffusers.DDIMScheduler(num_train_timesteps=10), "DDIMScheduler refuses 20 steps"),
    ],
)
def test_what_is_no_table_is_refused_by_its_reason(scheduler, message):
    with pytest.raises(UsageError, match=message):
        tabulate(scheduler, 20)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_train_timesteps": -5}, "cannot be made of the pipeline's configuration"),
        ({"beta_schedule": "mine"}, "mine is not implemented"),
        ({"algorithm_type": "dpmsolver"}, "`algorithm_type` dpmsolver"),
        ({"trained_betas": "many"}, "cannot be made of the pipeline's configuration"),
    ],
)
def test_a_scheduler_s_own_reason_is_kept(config, message):
    base = SchedulerConfig("DPMSolverMultistepScheduler", config)
    with pytest.raises(UsageError, match=message) as refused:
        tabulate(make_scheduler(None, base), 20)
    assert "\n" not in str(refused.value)


def test_a_scheduler_without_its_package_gives_way_to_another():
    """DPMSolverSDEScheduler needs torchsde, which nothing here does."""
    base = SchedulerConfig("DPMSolverSDEScheduler", dict(BASE.config))
    with pytest.raises(UsageError, match=r"sampler 'DPMSolverSDEScheduler' cannot be made .*torchsde"):
        make_scheduler(None, base)
    assert tabulate(make_scheduler("ddim", base), 5).calls == 5


@pytest.mark.parametrize("name", ["ddim", "DDIMScheduler"])
def test_ddim_clips_only_where_the_pipeline_does(name):
    """Its default is to; a pipeline made for DPM-Solver++ says nothing of it."""
    assert not make_scheduler(name, diffusers.DPMSolverMultistepScheduler()).config.clip_sample
    assert tabulate(make_scheduler(name, diffusers.DPMSolverMultistepScheduler()), 5).calls == 5
    with pytest.raises(UsageError, match="not linear"):
        tabulate(make_scheduler(name, diffusers.DDIMScheduler(clip_sample=True)), 5)


def test_flow_matching_is_refused_by_its_name():
    with pytest.raises(UsageError, match="EulerDiscreteScheduler is for flow matching, which is not supported"):
        tabulate(diffusers.FlowMatchEulerDiscreteScheduler(), 5)


def test_one_step_and_unknown_names_are_refused():
    with pytest.raises(UsageError, match="at least 2"):
        tabulate(BASE, 1)
    with pytest.raises(UsageError, match=r"unknown sampler 'dimm'; use ddim"):
        make_scheduler("dimm", BASE)


def test_scaled_noise_is_refused_where_the_pipeline_forgets_it():
    euler = make_scheduler("euler", BASE)
    assert tabulate(euler, 10).calls == 10
    with pytest.raises(UsageError, match="scaled noise"):
        tabulate(euler, 10, scales_noise=False)


@pytest.mark.parametrize("name", sorted(ALIASES))
def test_the_recorded_configuration_restores_the_scheduler(name):
    scheduler = make_scheduler(name, BASE)
    sampler = tabulate(scheduler, 5)
    config = json.loads(json.dumps(sampler.config, allow_nan=False))
    restored = tabulate(getattr(diffusers, sampler.name).from_config(config), 5)
    assert np.array_equal(restored.rows, sampler.rows)
    assert restored.timesteps == sampler.timesteps
