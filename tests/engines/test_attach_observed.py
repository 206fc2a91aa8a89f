"""A bundle in the place of the denoiser of a pipeline that is observed: packed latents, two calls per step."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, FluxPipeline
from PIL import ImageOps

import dipgo
from tests import zoo
from tests.checks import error, misused
from tests.engines.dropin import STEPS, compiled


@pytest.fixture(scope="module")
def flux():
    return compiled("flux")


@pytest.fixture(scope="module")
def cogview4():
    return compiled("cogview4", False)


def test_a_pipeline_that_users_loaded_is_observed_as_it_is(flux):
    """In half precision too, of which only rounding is seen."""
    pipe = FluxPipeline.from_pretrained(zoo.pipeline("flux"))
    pipe.set_progress_bar_config(disable=True)
    expected = flux.expected()
    with dipgo.attach(pipe, flux.folder):
        assert error(flux.call(pipe), expected) <= 1e-4
        pipe.to(torch.bfloat16)
    with dipgo.attach(pipe, flux.folder):
        assert error(flux.call(pipe), expected) <= 0.1


def test_pictures_are_the_pipeline_s_own_affair():
    """Inpainting by nine channels: whatever is painted over comes as a condition; embeddings alone go without it."""
    inpaint = compiled("sd-inpaint", False)
    with inpaint.gates():
        expected = inpaint.call(inpaint.pipe)
        other = inpaint.call(inpaint.pipe, mask_image=ImageOps.invert(inpaint.arguments["mask_image"]))
    assert error(other, expected) > 0.01
    with dipgo.attach(inpaint.pipe, inpaint.folder) as pipe:
        assert error(inpaint.call(pipe), expected) <= 1e-4
        with misused("strength = 0.5, the bundle was compiled for 1.0"):
            inpaint.call(pipe, strength=0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_inference_steps": STEPS + 1},
            f"num_inference_steps = {STEPS + 1}, the bundle was compiled for {STEPS};",
        ),
        ({"guidance_scale": float("inf")}, "guidance_scale = inf; give a finite number"),
        ({"height": 48}, "height 48, it takes 32 alone"),
        ({"height": None, "width": None}, r"image is \[\d+, 16\], the bundle's \[64, 16\]; give height = 32 and"),
        ({"true_cfg_scale": 2.0, "negative_prompt": "fog"}, "true_cfg_scale = 2.0, the bundle was compiled for 1.0;"),
        ({"max_sequence_length": 256}, "max_sequence_length = 256, the bundle was compiled for 512;"),
        ({"sigmas": [1.0, 0.7, 0.4, 0.1]}, r"sigmas = \[1.0, .*, the bundle was compiled for None; leave it out"),
        ({"joint_attention_kwargs": {"scale": 0.5}}, "joint_attention_kwargs = .*scale.*, the bundle was compiled for"),
    ],
)
def test_other_requests_are_refused(flux, changes, message):
    with dipgo.attach(flux.pipe, flux.folder) as pipe, misused(message):
        flux.call(pipe, **changes)


def test_another_scheduler_is_refused(flux):
    own = flux.pipe.scheduler
    for other, message in (
        (FlowMatchHeunDiscreteScheduler(), "is FlowMatchHeunDiscreteScheduler, .* for FlowMatchEulerDiscreteScheduler"),
        (FlowMatchEulerDiscreteScheduler.from_config(own.config, shift=1.0), "has shift = 1.0, .* for 3.0"),
    ):
        flux.pipe.scheduler = other
        with misused(message):
            dipgo.attach(flux.pipe, flux.folder)
    flux.pipe.scheduler = own


def test_both_passes_are_heard_before_the_first_step(cogview4):
    """Nobody sees it: generators are where they were, and callbacks are called once per step."""
    steps = []

    def count(pipe, step, timestep, given):
        steps.append(step)
        return given

    def shift(pipe, step, timestep, given):
        return {"latents": given["latents"] + (0.5 if step == 1 else 0)}

    torch.manual_seed(5)
    expected = cogview4.expected(generator=None)
    shifted = cogview4.expected(callback_on_step_end=shift)
    generators = [[torch.Generator().manual_seed(seed) for seed in (1, 2, 3)] for _ in range(2)]
    several = cogview4.expected(generator=generators[0])
    with dipgo.attach(cogview4.pipe, cogview4.folder) as pipe:
        torch.manual_seed(5)
        assert error(cogview4.call(pipe, generator=None, callback_on_step_end=count), expected) <= 1e-4
        assert error(cogview4.call(pipe, generator=generators[1]), several) <= 1e-4
        assert error(cogview4.call(pipe, callback_on_step_end=shift), shifted) <= 1e-4
    assert steps == list(range(STEPS))


def test_two_calls_per_step_are_told_from_one(cogview4):
    def weaker(pipe, step, timestep, given):
        pipe._guidance_scale = 1.0
        return given

    with dipgo.attach(cogview4.pipe, cogview4.folder) as pipe:
        with misused("guidance_scale = 1.0, the call began with 4.0; it cannot change on the way"):
            cogview4.call(pipe, callback_on_step_end=weaker)
        pipe._guidance_scale = 4.0
        latent, words = torch.zeros(1, 4, 16, 16), torch.zeros(1, 16, 12)
        sizes = {name: torch.tensor([[32.0, 32.0]]) for name in ("original_size", "target_size")}
        given = {"hidden_states": latent, "encoder_hidden_states": words, "timestep": torch.ones(1), **sizes}
        given |= {"crop_coords": torch.zeros(1, 2), "attention_kwargs": None, "return_dict": False}
        with misused("called by itself; a bundle with two calls per step"):
            pipe.transformer(**given | {"timestep": torch.tensor([cogview4.subnet.sampler.timesteps[0]])})


def test_skipped_layers_are_refused():
    """Skip-layer guidance is a call more."""
    sd3 = compiled("sd3")
    with dipgo.attach(sd3.pipe, sd3.folder) as pipe, misused(r"skip_guidance_layers = \[0\], .* compiled for None"):
        sd3.call(pipe, skip_guidance_layers=[0])
