"""A bundle in the place of a diffusers pipeline's denoiser: the images of the gated pipeline, and nothing silent."""

import inspect

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

import dipgo
from dipgo.base.errors import DipgoWarning
from tests import zoo
from tests.checks import error, misused
from tests.engines.dropin import STEPS, compiled

KINDS = ["sd", "dit", "sdxl", "pixart", "unconditional"]  # the first gives way where only a height is given
WHOLE = ("sd", "unconditional", "flux", "sd3")


@pytest.fixture(params=[*KINDS, "flux", "cogview4", pytest.param("sd3", marks=pytest.mark.slow)])
def made(request):
    return compiled(request.param, request.param in WHOLE)


@pytest.fixture
def dit():
    return compiled("dit", False)


@pytest.fixture
def sdxl():
    """Its sampler scales the denoiser's input."""
    return compiled("sdxl", False)


def test_images_are_those_of_the_gated_pipeline(made):
    """Three images in one call, a lane each; afterwards the pipeline is as before.

    PNDM, Stable Diffusion's own, calls the denoiser twice at one timestep, and graphs combine several past x and ε.
    """
    denoiser, config, kind = getattr(made.pipe, made.component), made.pipe.config[made.component], type(made.pipe)
    plain, expected = made.call(made.pipe), made.expected()
    assert error(plain, expected) > 1e-3  # the gates do something
    with dipgo.attach(made.pipe, made.folder) as pipe:
        assert isinstance(pipe, kind)
        assert error(made.call(pipe), expected) <= 1e-4
        assert error(made.call(pipe, seed=4), made.call(pipe)) > 1e-2
    assert getattr(made.pipe, made.component) is denoiser
    assert made.pipe.config[made.component] == config
    assert type(made.pipe) is kind
    assert np.array_equal(made.call(made.pipe), plain)


@pytest.mark.parametrize("kind", zoo.some([(kind,) for kind in KINDS[1:]], {("dit",), ("unconditional",)}))
def test_other_requests_are_refused_before_they_run(kind):
    made = compiled(kind, kind in WHOLE)
    changes = {
        "num_inference_steps": (STEPS + 1, f"num_inference_steps = {STEPS + 1}, the bundle was compiled for {STEPS};"),
        "guidance_scale": (float("nan"), "guidance_scale = nan; give a finite number"),
        "eta": (0.5, "eta = 0.5, the bundle was compiled for 0.0"),
        "timesteps": ([9, 5, 1], r"timesteps = \[9.0, 5.0, 1.0\], the bundle was compiled for \["),
        "guidance_rescale": (0.7, "guidance_rescale = 0.7, the bundle was compiled for 0; ask"),
        "denoising_end": (0.8, "denoising_end = 0.8"),
        "cross_attention_kwargs": ({"scale": 0.5}, "cross_attention_kwargs = .*scale.*"),
        "height": (1024, "height 1024, it takes 16;"),
    }
    calls = 0
    with dipgo.attach(made.pipe, made.folder) as pipe:
        accepted = inspect.signature(pipe.__call__).parameters
        for name, (value, message) in changes.items():
            if name not in accepted or (kind == "pixart" and name == "height"):
                continue
            with misused(message):
                made.call(pipe, **{name: value})
            calls += 1
        assert np.isfinite(made.call(pipe)).all()
    assert calls >= 2


def test_a_denoiser_that_is_called_without_guidance_is_refused(dit):
    with dipgo.attach(dit.pipe, dit.folder) as pipe:
        denoiser = pipe.transformer
        with misused("called without guidance, on 2 images"):
            denoiser(torch.randn(2, 4, 8, 8), timestep=pipe.scheduler.timesteps[:1], class_labels=torch.tensor([0, 1]))


def test_callbacks_may_change_latents_but_not_conditions(sdxl):
    """x is the pipeline's own, so a changed one gives what the gated pipeline gives from it."""

    def shift(pipe, step, timestep, given):
        return {"latents": given["latents"] + (0.5 if step == 0 else 0)}

    def swap(pipe, step, timestep, given):
        return {"prompt_embeds": given["prompt_embeds"] + (step == 1)}

    def stronger(pipe, step, timestep, given):
        pipe._guidance_scale = 6.0
        return given

    def stop(pipe, step, timestep, given):
        pipe._interrupt = step == 1
        return given

    expected = sdxl.expected(callback_on_step_end=shift)
    with pytest.warns(DipgoWarning, match="ended at call 2 of 4"):
        stopped = sdxl.expected(callback_on_step_end=stop)
    whole = sdxl.expected()
    assert error(expected, whole) > 1e-3
    with dipgo.attach(sdxl.pipe, sdxl.folder) as pipe:
        assert error(sdxl.call(pipe, callback_on_step_end=shift), expected) <= 1e-4
        asked = {"callback_on_step_end": swap, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
        with misused("'encoder_hidden_states' changed at step 2"):
            sdxl.call(pipe, **asked)
        with misused(r"guidance_scale = 6.0, the call began with 4.0; it cannot change"):
            sdxl.call(pipe, callback_on_step_end=stronger)
        assert error(sdxl.call(pipe, callback_on_step_end=stop), stopped) <= 1e-4
        assert error(sdxl.call(pipe), whole) <= 1e-4


def test_calls_out_of_order_are_told_by_the_timestep(dit):
    with dipgo.attach(dit.pipe, dit.folder) as pipe:
        pipe.scheduler.set_timesteps(STEPS)
        moments = pipe.scheduler.timesteps
        latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1)

        def call(moment):
            given = {"timestep": moment.expand(2), "class_labels": torch.tensor([1, 1000])}
            return pipe.transformer(latent, **given).sample

        with misused(rf"called at timestep {float(moments[1])}, .* expects the first, "):
            call(moments[1])
        first = [call(moments[0]), call(moments[1])]
        again = [call(moments[0]), call(moments[1])]  # the first timestep begins anew
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
        with misused(rf"called at timestep {float(moments[3])}, .* after 2 steps"):
            call(moments[3])
        assert torch.equal(call(moments[0]), first[0])


def test_another_pipeline_is_refused(dit, sdxl):
    pipe = dit.pipe
    with misused(r"the denoiser is a UNet2DConditionModel, .* from a DiTTransformer2DModel"):
        dipgo.attach(sdxl.pipe, dit.folder)

    own = pipe.scheduler
    for other, message in (
        (DPMSolverMultistepScheduler.from_config(own.config), "is DPMSolverMultistepScheduler, .* for DDIMScheduler"),
        (type(own).from_config(own.config, prediction_type="v_prediction"), "prediction_type = 'v_prediction', .*'eps"),
        (type(own).from_config(own.config, timestep_spacing="trailing"), "timestep_spacing = 'trailing', .*'leading'"),
    ):
        with dipgo.attach(pipe, dit.folder):
            pipe.scheduler = other
            with misused(message):
                dit.call(pipe)
            pipe.scheduler = own

    weight = pipe.transformer.transformer_blocks[1].attn1.to_v.weight
    held = weight.data.clone()
    weight.data[0] *= 1.001
    with misused(r"'transformer_blocks.1.attn1.to_v.weight' .* is not that of"):
        dipgo.attach(pipe, dit.folder)
    weight.data = held

    pipe.transformer.register_to_config(norm_eps=1e-3)
    with misused(r"the denoiser's configuration \(.*\) is not that of"):
        dipgo.attach(pipe, dit.folder)
    pipe.transformer.register_to_config(norm_eps=1e-5)


def test_attaching_and_detaching_twice(dit):
    attached = dipgo.attach(dit.pipe, dit.folder)
    with misused("has a bundle attached already"):
        dipgo.attach(dit.pipe, dit.folder)
    with pytest.raises(AttributeError, match="'enable_gradient_checkpointing' has no effect on a bundle"):
        dit.pipe.transformer.enable_gradient_checkpointing()
    dipgo.detach(dit.pipe)
    assert dit.pipe.transformer is attached.original
    with misused("has no bundle attached"):
        dipgo.detach(dit.pipe)
