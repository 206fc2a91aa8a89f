"""A bundle called like the diffusers pipeline that it came from: its images, its manners, and one line otherwise."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler
from PIL import Image

import dipgo
from dipgo.base.errors import DipgoWarning
from engines.serving.limits import Limits
from engines.serving.requests import read_rows
from tests import command, models, zoo
from tests.checks import error, misused
from tests.engines.dropin import STEPS, compiled

EMBEDDED = np.zeros((3, 77, 24), np.float32)
EMBEDDINGS = {"prompt": None, "prompt_embeds": EMBEDDED, "negative_prompt_embeds": EMBEDDED}


@pytest.fixture(scope="module")
def sd():
    return compiled("sd")


@pytest.fixture(scope="module")
def pipe(sd):
    """Never entered: the first call opens the engines."""
    pipe = dipgo.load(sd.folder)
    pipe.set_progress_bar_config(disable=True)
    yield pipe
    pipe.close()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"negative_prompt": ["blue"] * 3},
        {"negative_prompt": ["blue", "", "green"]},
        {"prompt": "a red fox", "num_images_per_prompt": 2},
        {"prompt": ["a red fox", "two dogs"], "num_images_per_prompt": 2, "negative_prompt": ["", "blue"]},
        {"prompt": "a red fox", "num_images_per_prompt": 3, "negative_prompt": "blue"},
        {"generator": "list"},
        {"latents": "noise"},
        {"output_type": "latent"},
        {"output_type": "pt"},
        {"height": 16, "width": 16, "eta": 0.0, "guidance_rescale": 0.0, "cross_attention_kwargs": None},
    ],
    ids=str,
)
def test_images_are_those_of_the_gated_pipeline(sd, pipe, changes):
    def changed():
        made = {**changes}
        if "generator" in made:
            made["generator"] = [torch.Generator().manual_seed(seed) for seed in (5, 6, 7)]
        if "latents" in made:
            made["latents"] = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(8))
        return made

    expected, actual = sd.expected(**changed()), sd.call(pipe, **changed())
    assert type(actual) is type(expected)
    assert error(actual, expected) <= 1e-4


def test_embeddings_stand_for_prompts(sd, pipe):
    conditional, unconditional = sd.pipe.encode_prompt(["a red fox", "two dogs"], "cpu", 1, True)
    given = {"prompt": None, "prompt_embeds": conditional, "negative_prompt_embeds": unconditional}
    expected = sd.expected(prompt=["a red fox", "two dogs"])
    assert error(sd.call(pipe, **given), expected) <= 1e-4
    with misused("negative_prompt_embeds is missing"):
        sd.call(pipe, prompt=None, prompt_embeds=conditional)
    with misused(r"prompt_embeds is \[2, 5, 24\], the bundle was compiled for \[2, 77, 24\]"):
        sd.call(pipe, **given | {"prompt_embeds": conditional[:, :5]})


def test_seeds_and_generators(sd, pipe):
    """A seed is a generator with that seed; a generator moves on as it does in diffusers; no seed is a new one."""
    assert error(sd.call(pipe, generator=3), sd.call(pipe)) <= 1e-4
    ours, theirs = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    sd.call(pipe, generator=ours)
    sd.expected(generator=theirs)
    assert torch.equal(ours.get_state(), theirs.get_state())
    assert error(sd.call(pipe, generator=None), sd.call(pipe, generator=None)) > 1e-3
    for generator, message in (
        (np.random.default_rng(0), "generator is a Generator; give a seed, a torch.Generator"),
        ([1, 2], "2 generators for 3 images"),
        (2**64, "seed 18446744073709551616 is outside"),
    ):
        with misused(message):
            sd.call(pipe, generator=generator)


def test_what_comes_out(sd, pipe, capsys):
    pixels = sd.call(pipe)
    pictures = sd.call(pipe, output_type="pil")
    assert all(isinstance(picture, Image.Image) for picture in pictures)
    assert np.abs(np.stack(pictures) / 255 - pixels).max() <= 1 / 255
    output = pipe("a red fox", generator=3, output_type="np")
    assert output.images is output["images"] is output[0]
    (images,) = pipe("a red fox", generator=3, output_type="np", return_dict=False)
    assert np.array_equal(images, output.images)
    assert isinstance(pipe("a", generator=3, output_type="latent").images, np.ndarray)
    assert capsys.readouterr().err == ""
    pipe.set_progress_bar_config()
    sd.call(pipe, prompt=["a", "b"])
    pipe.set_progress_bar_config(disable=True)
    calls = 2 * len(pipe.record.steps)
    assert f"{calls}/{calls}" in capsys.readouterr().err, "progress is shown step by step"


def test_callbacks_see_the_latents_of_diffusers(sd, pipe):
    def watch(seen):
        def callback(owner, step, timestep, given):
            seen.append((step, float(timestep), given["latents"].clone()))
            return given

        return callback

    theirs, ours = [], []
    sd.expected(callback_on_step_end=watch(theirs))
    images = sd.call(pipe, callback_on_step_end=watch(ours))
    assert [entry[:2] for entry in ours] == [entry[:2] for entry in theirs]
    for (_, _, mine), (_, _, other) in zip(ours, theirs, strict=True):
        assert error(mine, other) <= 1e-4
    assert np.array_equal(images, sd.call(pipe))  # looking changes nothing


def test_callbacks_that_change_something_are_refused(sd, pipe):
    def in_place(given):
        given["latents"] += 1
        return given

    def anew(given):
        return {"latents": given["latents"] + 1}

    def prompts(given):
        return {"prompt_embeds": None}

    for change, what in ((in_place, "latents"), (anew, "latents"), (prompts, "prompt_embeds")):
        with misused(rf"the callback changed {what} at step 0; .* use attach\(\)"):
            sd.call(pipe, callback_on_step_end=lambda *call, change=change: change(call[-1]))
    with misused("shown latents, not 'prompt_embeds'"):
        sd.call(pipe, callback_on_step_end=print, callback_on_step_end_tensor_inputs=["prompt_embeds"])


def test_interruption_keeps_the_latents_of_the_step(sd, pipe):
    def stop(owner, step, timestep, given):
        owner._interrupt = step == 1
        return given

    with pytest.warns(DipgoWarning, match="ended at call 2 of 5"):
        expected = sd.expected(callback_on_step_end=stop)
    assert error(sd.call(pipe, callback_on_step_end=stop), expected) <= 1e-4
    assert error(sd.call(pipe), expected) > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_inference_steps": 50}, f"num_inference_steps = 50, the bundle was compiled for {STEPS};"),
        ({"height": 512}, "height 512, it takes 16"),
        ({"width": 24}, "width 24, it takes 16"),
        ({"eta": 1.0}, "eta = 1.0, the bundle was compiled for 0.0"),
        ({"timesteps": [3, 2, 1]}, r"timesteps = \[3.0, 2.0, 1.0\], the bundle was compiled for \["),
        ({"sigmas": [1.0, 0.5]}, r"sigmas = \[1.0, 0.5\]"),
        ({"guidance_scale": float("nan")}, "guidance_scale = nan; give a finite number"),
        (
            {"latents": np.full((3, 4, 8, 8), np.nan)},
            r"latents is not finite \(768 of 768 values are infinite or NaN\)",
        ),
        ({"clip_skip": 3}, "clip_skip = 3, the bundle was compiled for 0 to 2"),
        ({"guidance_rescale": 0.5}, "guidance_rescale = 0.5, the bundle was compiled for 0; ask"),
        ({"cross_attention_kwargs": {"scale": 1}}, "cross_attention_kwargs = .*scale"),
        ({"ip_adapter_image": "x.png"}, "ip_adapter_image = x.png"),
        ({"original_size": (8, 8)}, "original_size is given, the model takes none; leave it out"),
        ({"max_sequence_length": 10}, "max_sequence_length = 10, the bundle was compiled for 77"),
        ({"prompt_2": "other"}, "prompt_2 is given, the bundle has no second text encoder"),
        ({**EMBEDDINGS, "prompt_embeds": EMBEDDED + np.inf}, "prompt_embeds is not finite"),
        ({"prompt": [1, 2]}, "conditioned by prompt; give prompt, one or a list"),
        ({"prompt": []}, "conditioned by prompt; give prompt, one or a list"),
        ({"negative_prompt": ["a", "b"]}, "2 negative prompts for 3 prompts"),
        ({"num_images_per_prompt": 0}, "0 images"),
        ({"latents": np.zeros((1, 4, 8, 8))}, r"latents are \[1, 4, 8, 8\], this call is for \[3, 4, 8, 8\]"),
        ({"negative_prompt_embeds": EMBEDDED}, "negative_prompt_embeds is given without prompt_embeds; give all"),
        ({"pooled_prompt_embeds": EMBEDDED}, "pooled_prompt_embeds is given without prompt_embeds"),
        ({"prompt": None, "prompt_attention_mask": EMBEDDED}, "prompt_attention_mask is given without prompt_embeds"),
        ({**EMBEDDINGS, "negative_prompt": "blue"}, "both negative_prompt and embeddings are given; give negative_"),
        (
            {**EMBEDDINGS, "prompt_attention_mask": EMBEDDED},
            "prompt_attention_mask is given, the bundle takes negative_prompt_embeds, prompt_embeds; leave it out",
        ),
        ({"true_cfg_scale": 3.0}, "true_cfg_scale = 3.0; the model's pipeline calls it guidance_scale: give"),
        ({"joint_attention_kwargs": {"scale": 0.5}}, r"joint_attention_kwargs = \{'scale': 0.5\}, the bundle was"),
        ({"skip_guidance_layers": [7]}, r"skip_guidance_layers = \[7\], the bundle was compiled for None"),
        ({"output_type": "jpeg"}, "unknown output_type 'jpeg'; use pil, np, pt, latent"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_requests_are_refused_in_one_line(sd, pipe, changes, message):
    with misused(message) as caught:
        sd.call(pipe, **changes)
    assert len(str(caught.value)) < 300
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        pipe("a red fox", colour="red")


def test_scheduler_and_device_are_the_bundles(sd, pipe):
    config = pipe.scheduler.config
    pipe.scheduler = PNDMScheduler.from_config(config)
    with misused("scheduler is DDIMScheduler, the bundle was compiled for PNDMScheduler"):
        pipe.scheduler = DDIMScheduler.from_config(config)
    with misused(r"beta_end = 0.5, the bundle was compiled for 0.02"):
        pipe.scheduler = PNDMScheduler.from_config(config, beta_end=0.5)
    assert pipe.to("cpu") is pipe.to(torch.device("cpu"), torch.float32) is pipe
    with misused("device cuda:0, the bundle runs on ONNX Runtime CPU"):
        pipe.to("cuda:0")
    with misused("dtype float16, the bundle is float32"):
        pipe.to(dtype=torch.float16)


def test_without_conditions_and_without_a_vae(tmp_path):
    """As the pipeline does it, from Python and on the command line."""
    made = compiled("unconditional")
    with dipgo.load(made.folder) as pipe:
        pipe.set_progress_bar_config(disable=True)
        assert error(made.call(pipe), made.expected()) <= 1e-4
        with misused("nothing conditions it; give batch_size alone"):
            pipe("a red fox")
        with misused("conditioned by nothing; leave prompt_embeds out"):
            pipe(prompt_embeds=EMBEDDED)
        expected = made.call(pipe, batch_size=2, generator=3)
        assert np.array_equal(pipe.generate([""] * 2, 3), expected)
    arguments = ["run", str(made.folder), "--seed", "3", "-n", "2", "-o", str(tmp_path / "x.png")]
    assert command.dipgo(*arguments).code == 0
    assert np.abs(np.array(Image.open(tmp_path / "x.png")) / 255 - np.hstack(expected)).max() <= 1 / 255


def test_what_a_bundle_of_classes_and_of_latents_alone_refuses():
    with dipgo.load(compiled("dit", whole=False).folder) as program:
        with misused("holds no VAE decoder, only latents can be had from it"):
            program.generate([0], 3)
        for given in ({"negative_prompt": "blue"}, {"prompt_embeds": EMBEDDED}, {"pooled_prompt_embeds": EMBEDDED}):
            with misused(f"conditioned by class; leave {next(iter(given))} out"):
                program(class_labels=[0], output_type="latent", **given)
        assert program.contexts.launches == 0


def test_negative_prompts_are_for_bundles_with_guidance(tmp_path):
    """From Python, from the command line and over the network: the images would be the same without."""
    traced, table = zoo.trace("sd", guidance=1.0), zoo.sampler("sd", STEPS)
    folder = zoo.bundle(traced, table, models.random_subnet(traced, table, seed=0))
    message = "a negative prompt is given, and the bundle was compiled for guidance 1, at which none is read"
    with dipgo.load(folder) as program:
        with misused(message):
            program.generate(["a red fox"], 0, negative="blue")
        tensors = {"prompt": b"a red fox", "negative_prompt": b"blue"}
        with misused(message):
            read_rows(program, {name: np.array([[text]], object) for name, text in tensors.items()}, Limits())
        program.check_negative("")
        assert program.contexts.launches == 0
    arguments = ["run", str(folder), "--prompt", "a red fox", "--negative", "blue", "-o", str(tmp_path / "x.png")]
    result = command.dipgo(*arguments)
    assert result.code == 2
    assert message in result.err
    assert not (tmp_path / "x.png").exists()
