"""Samplers as diffusers configures them: images of the compiled program against the pipeline's own."""

from itertools import product

import diffusers
import numpy as np
import pytest
import torch

import dipgo
from dipgo.base.errors import UsageError
from dipgo.eager.gating import gated
from dipgo.model.sampler import make_scheduler, tabulate
from dipgo.schedule.schedule import Schedule
from dipgo.schedule.search_record import SearchRecord
from dipgo.schedule.subnet import make_subnet
from export.compiler import write_bundle
from tests import zoo
from tests.checks import error

STEPS, GUIDANCE = 6, 4.0
PREDICTIONS = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "linspace", "trailing")
SIGMAS = ({}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True})
WITH_SIGMAS = (
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "UniPCMultistepScheduler",
)
OTHERS = [
    ("DDIMScheduler", "v_prediction", "trailing", {"rescale_betas_zero_snr": True}),
    ("DPMSolverMultistepScheduler", "epsilon", "linspace", {"solver_order": 3}),
    ("DPMSolverMultistepScheduler", "epsilon", "linspace", {"solver_type": "heun", "euler_at_final": True}),
    ("DPMSolverMultistepScheduler", "epsilon", "linspace", {"final_sigmas_type": "sigma_min", "use_lu_lambdas": True}),
    ("UniPCMultistepScheduler", "epsilon", "linspace", {"solver_order": 3, "solver_type": "bh1"}),
]
CASES = [
    *product(("DDIMScheduler", "PNDMScheduler"), PREDICTIONS, SPACINGS, [{}]),
    *product(WITH_SIGMAS, PREDICTIONS[:2], SPACINGS, SIGMAS),
    *OTHERS,
]
QUICK = (*CASES[4::25], *OTHERS[:1])


@pytest.fixture(scope="module")
def pipe():
    pipe = zoo.model("sd").pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(("name", "prediction", "spacing", "options"), zoo.some(CASES, QUICK))
def test_images_are_those_of_diffusers(pipe, tmp_path, name, prediction, spacing, options):
    """All blocks in every step; then random blocks, and a step that computes nothing."""
    traced = zoo.trace("sd")
    config = {"prediction_type": prediction, "timestep_spacing": spacing, "clip_sample": False, **options}
    arguments = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "np"}

    def images():
        generator = torch.Generator().manual_seed(3)
        return pipe(["a red fox", "two dogs"], generator=generator, **arguments).images

    try:
        pipe.scheduler = getattr(diffusers, name).from_config(zoo.model("sd").scheduler.config, **config)
        finite = np.isfinite(images()).all()
    except Exception as reason:  # diffusers refuses some of the combinations, each in its own way
        pytest.skip(f"not of diffusers: {reason}")
    if not finite:
        pytest.skip("no numbers in diffusers either")
    table = tabulate(make_scheduler(None, pipe.scheduler), STEPS)
    gates = np.random.default_rng(0).random((table.calls, len(traced.sites))) < 0.6
    gates[0], gates[3] = True, False
    for chosen in (np.ones_like(gates), gates):
        subnet = make_subnet(traced, table.identity(GUIDANCE), Schedule(chosen), SearchRecord())
        folder = tmp_path / ("full" if chosen.all() else "gated")
        write_bundle(zoo.converted(traced), subnet, table, folder)
        with gated(pipe.unet, subnet):
            expected = images()
        with dipgo.load(folder) as program:
            program.set_progress_bar_config(disable=True)
            assert error(program(["a red fox", "two dogs"], generator=3, **arguments).images, expected) <= 1e-3


@pytest.mark.parametrize("name", ["EulerAncestralDiscreteScheduler", "DDPMScheduler", "LCMScheduler"])
def test_samplers_that_draw_noise_are_refused_by_their_reason(pipe, name):
    scheduler = make_scheduler(name, pipe.scheduler)
    with pytest.raises(UsageError, match=r"draws noise at every step, which is not supported yet"):
        tabulate(scheduler, STEPS)
