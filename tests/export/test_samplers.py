"""Samplers as diffusers configures them: images of the compiled program against the pipeline's own."""

from itertools import product

import diffusers
import numpy as np
import pytest
import torch

import dipgo
from dipgo.eager.gating import gated
from dipgo.model.sampler import make_scheduler, tabulate
from dipgo.schedule.schedule import Schedule
from dipgo.schedule.search_record import SearchRecord
from dipgo.schedule.subnet import make_subnet
from engines.serving.requests import Row, render
from export.compiler import write_bundle
from tests import zoo
from tests.checks import error, misused, python
from tests.models import random_subnet

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
DRAW = [
    ("EulerAncestralDiscreteScheduler", "v_prediction", "linspace", {}),
    ("LCMScheduler", "epsilon", "leading", {}),
    ("DDPMScheduler", "epsilon", "leading", {}),
    ("DPMSolverMultistepScheduler", "epsilon", "linspace", {"algorithm_type": "sde-dpmsolver++"}),
    ("KDPM2AncestralDiscreteScheduler", "epsilon", "linspace", {}),
    ("SASolverScheduler", "epsilon", "linspace", {}),
    ("TCDScheduler", "epsilon", "leading", {}),  # which the pipeline gives eta = 0
]
CASES = [
    *product(("DDIMScheduler", "PNDMScheduler"), PREDICTIONS, SPACINGS, [{}]),
    *product(WITH_SIGMAS, PREDICTIONS[:2], SPACINGS, SIGMAS),
    *OTHERS,
    *DRAW,
]
QUICK = (*CASES[4:-12:25], *OTHERS[:1], *DRAW[:4])


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


PROMPTS = ["a red fox", "two dogs", "a harbour"]
ARGUMENTS = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "np"}


@pytest.fixture(scope="module")
def ancestral(pipe):
    """A SubNet under a sampler that draws noise, and its bundle for one or two images."""
    pipe.scheduler = make_scheduler("euler-a", zoo.model("sd").scheduler)
    traced, table = zoo.trace("sd"), tabulate(pipe.scheduler, STEPS)
    subnet = random_subnet(traced, table, seed=0, terms=2, channels=2)
    subnet.gates[3] = False
    return subnet, zoo.bundle(traced, table, subnet, batch="1:2")


def images_of_diffusers(pipe, subnet, generator, **options):
    pipe.scheduler = make_scheduler("euler-a", zoo.model("sd").scheduler)
    with gated(pipe.unet, subnet):
        return pipe(generator=generator, **ARGUMENTS | options).images


@pytest.mark.parametrize(
    ("seeds", "options"),
    [
        (5, {"prompt": PROMPTS}),  # a batch of two, and one of one
        ([5, 6, 7], {"prompt": PROMPTS}),
        (5, {"prompt": PROMPTS[0], "num_images_per_prompt": 3}),
        (5, {"prompt": PROMPTS[:2], "latents": torch.ones(2, 4, 8, 8)}),
    ],
)
def test_noise_is_drawn_as_the_pipeline_draws_it(pipe, ancestral, seeds, options):
    subnet, folder = ancestral

    def generator():
        each = [torch.Generator().manual_seed(seed) for seed in np.ravel(seeds).tolist()]
        return each if isinstance(seeds, list) else each[0]

    theirs, mine, steps = generator(), generator(), []
    expected = images_of_diffusers(pipe, subnet, theirs, **options)
    with dipgo.load(folder) as program:
        program.set_progress_bar_config(disable=True)
        assert error(program(generator=mine, **ARGUMENTS, **options).images, expected) <= 1e-3
        if not isinstance(seeds, list):
            assert torch.equal(mine.get_state(), theirs.get_state())  # both have drawn equally much
        seen = {"callback_on_step_end": lambda pipe, step, *_: steps.append(step) or {}}  # all images together
        assert error(program(generator=seeds, **ARGUMENTS, **options, **seen).images, expected) <= 1e-3
    assert steps == list(range(STEPS))


def test_drawn_noise_needs_no_torch(pipe, ancestral, tmp_path):
    subnet, folder = ancestral
    code = "import dipgo\nimport numpy as np\nwith dipgo.load(sys.argv[1]) as program:\n"
    code += f"    np.save(sys.argv[2], program.generate({PROMPTS}, 9))"
    python(code, folder, tmp_path / "images.npy", without="torch diffusers transformers onnx onnx_ir")
    expected = images_of_diffusers(pipe, subnet, torch.Generator().manual_seed(9), prompt=PROMPTS)
    assert error(np.load(tmp_path / "images.npy"), expected) <= 1e-3


def test_requests_share_batches_each_with_its_own_draws(ancestral):
    with dipgo.load(ancestral[1]) as program:
        answers = render([Row(program, PROMPTS[0], None, seed, 3) for seed in (1, 2)])
        for seed, answer in zip((1, 2), answers, strict=True):
            assert np.abs(answer / 255 - program.generate([PROMPTS[0]] * 3, seed)).max() <= 1e-2
        with misused(r"this sampler draws it 6 times on its way, and each image takes 7 of it: \[n, 7"):
            program.denoise(np.zeros((1, 4, 8, 8), np.float32), program.conditions(PROMPTS[:1]))


def test_attached_the_pipeline_draws_itself(pipe, ancestral):
    subnet, folder = ancestral
    expected = images_of_diffusers(pipe, subnet, torch.Generator().manual_seed(9), prompt=PROMPTS[:2])
    with dipgo.attach(pipe, folder):
        actual = pipe(PROMPTS[:2], generator=torch.Generator().manual_seed(9), **ARGUMENTS).images
    assert error(actual, expected) <= 1e-3
