"""Image-to-image and inpainting: the images of diffusers' pipelines under the same gates, from the same step."""

from dataclasses import replace
from functools import cache
from itertools import product

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import dipgo
from dipgo.eager.gating import gated
from dipgo.model.families.pictures import OF_PICTURES
from export.bundle import open_bundle
from tests import command, zoo
from tests.checks import error, misused
from tests.engines.dropin import compiled

STEPS = 10
PROMPTS = ["a red fox", "two dogs"]
STRENGTHS = (0.3, 0.6, 1.0)


@cache
def made(kind, name=None):
    return compiled(kind, steps=STEPS, image=True, name=name)


@cache
def of_pictures(kind, masked, name=None):
    """Return the diffusers pipeline that starts from pictures, of the same components."""
    pipe = made(kind, name).pipe
    chosen = getattr(diffusers, OF_PICTURES[type(pipe).__name__][masked])
    wanted, options = chosen._get_signature_keys(chosen)[0], {"requires_safety_checker": False} if kind == "sd" else {}
    result = chosen(**{name: part for name, part in pipe.components.items() if name in wanted}, **options)
    result.set_progress_bar_config(disable=True)
    return result


def opened(made, **options):
    pipe = dipgo.load(made.folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(side, seed=0, mode="RGB"):
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC).convert(mode)


def arguments(kind, strength, masked, **changes):
    side = 32 if kind in ("flux", "sd3-16") else 16
    given = {"prompt": PROMPTS, "image": picture(side), "strength": strength, "guidance_scale": 4.0}
    given |= {"mask_image": picture(side, 1, "L")} if masked else {}
    given |= {"height": 32, "width": 32} if kind == "flux" else {}
    given |= {"num_inference_steps": STEPS, "generator": torch.Generator().manual_seed(3), "output_type": "np"}
    return given | changes


def gated_images(kind, strength, masked, name=None, **changes):
    """Return the images of the diffusers pipeline under the gates, from the step that it starts at."""
    one, pipe = made(kind, name), of_pictures(kind, masked, name)
    left_out = int(STEPS - STEPS * strength) if kind in ("flux", "sd3-16") else STEPS - int(STEPS * strength)
    with gated(getattr(pipe, one.component), one.subnet, left_out * pipe.scheduler.order):
        return pipe(**arguments(kind, strength, masked, **changes)).images


@pytest.mark.parametrize(
    ("kind", "masked"),
    zoo.some(
        product(["sd", "sdxl", "sd3-16", "flux"], [False, True]),
        [("sd", False), ("sd", True), ("sdxl", True), ("sd3-16", False), ("flux", True)],
    ),
)
def test_images_are_those_of_diffusers(kind, masked):
    """Of Stable Diffusion 3 with a mask the latents: decoding, diffusers leaves out what the VAE's config shifts by."""
    pipe = of_pictures(kind, masked)
    form = {"output_type": "latent"} if masked and kind == "sd3-16" else {}
    with opened(made(kind)) as bundle:
        for strength in STRENGTHS:
            expected = gated_images(kind, strength, masked, **form)
            assert error(pipe(**arguments(kind, strength, masked, **form)).images, expected) > 1e-3
            assert error(bundle(**arguments(kind, strength, masked, **form)).images, expected) <= 1e-4
            with dipgo.attach(pipe, bundle):
                assert error(pipe(**arguments(kind, strength, masked, **form)).images, expected) <= 1e-4


@pytest.mark.parametrize(
    ("name", "masked"),
    zoo.some(product(["dpm++2m", "euler-a", "heun", "unipc"], [False, True]), [("dpm++2m", True), ("euler-a", True)]),
)
def test_samplers_start_as_diffusers_has_them(name, masked):
    """Without a past, with noise drawn on the way, with two calls a step."""
    with opened(made("sd", name)) as bundle:
        for strength in STRENGTHS:
            expected = gated_images("sd", strength, masked, name)
            assert error(bundle(**arguments("sd", strength, masked)).images, expected) <= 1e-3


def test_pictures_come_in_all_forms(monkeypatch):
    """Lists, arrays, tensors; generators of their own; and what is resized."""
    one, other, mask = picture(16), picture(16, 2), picture(16, 1, "L")
    arrays = [np.asarray(each, np.float32) / 255 for each in (one, other)]

    def generators():
        return [torch.Generator().manual_seed(seed) for seed in (5, 6)]

    with opened(made("sd")) as bundle:
        for masked, changes in (
            (False, {"image": [one, other]}),
            (False, {"image": arrays}),
            (False, {"image": torch.from_numpy(np.stack(arrays).transpose(0, 3, 1, 2).copy())}),
            (True, {"image": picture(24), "mask_image": picture(20, 1, "L")}),
            (True, {"image": [one, other], "mask_image": [mask, picture(16, 4, "L")]}),
            (True, {"image": arrays[0], "mask_image": np.asarray(mask, np.float32) / 255}),
        ):
            for own in (lambda: torch.Generator().manual_seed(3), generators):
                if own is generators and masked and not isinstance(changes["image"], list):
                    continue
                expected = gated_images("sd", 0.6, masked, generator=own(), **changes)
                images = bundle(**arguments("sd", 0.6, masked, generator=own(), **changes)).images
                assert error(images, expected) <= 1e-4
        expected = gated_images("sd", 0.8, False)
        assert error(bundle(**arguments("sd", None, False)).images, expected) <= 1e-4  # the pipeline's own strength


def test_callbacks_count_from_the_start():
    seen = {}

    def log(name):
        def callback(pipe, step, timestep, tensors):
            seen.setdefault(name, []).append((step, int(timestep)))
            return tensors

        return callback

    with opened(made("sd")) as bundle:
        bundle(**arguments("sd", 0.3, False, callback_on_step_end=log("bundle")))
    gated_images("sd", 0.3, False, callback_on_step_end=log("diffusers"))
    assert len(seen["bundle"]) == len(seen["diffusers"]) == 4  # PNDM calls once more
    assert seen["bundle"] == seen["diffusers"]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["segment", "step"])
def test_every_layout_and_backend_starts(layout):
    task = zoo.task("sd", STEPS)
    traced = zoo.trace("sd", size=(8, 8), open_guidance=True)
    folder = zoo.bundle(traced, task.sampler, made("sd").subnet, layout, "1:3", "16:32", image=True)
    expected = gated_images("sd", 0.6, True)
    for backend in ("onnxruntime", "torch") if layout == "step" else ("onnxruntime",):
        with dipgo.load(folder, backend=backend) as bundle:
            bundle.set_progress_bar_config(disable=True)
            assert error(bundle(**arguments("sd", 0.6, True, height=16, width=16)).images, expected) <= 1e-4
    wide = gated_images("sd", 0.6, False, image=picture(33).resize((33, 16)))
    with opened(replace(made("sd"), folder=folder)) as bundle:
        images = bundle(**arguments("sd", 0.6, False, image=picture(33).resize((33, 16)))).images
        assert images.shape == (2, 16, 32, 3)
        assert error(images, wide) <= 1e-4


def test_without_pictures_programs_are_the_same():
    plain, other = open_bundle(compiled("sd", steps=STEPS).folder).record, open_bundle(made("sd").folder).record
    for name in ("graphs", "steps", "slots", "prologues", "parts"):
        assert getattr(plain, name) == getattr(other, name)
    for file in plain.files.keys() - {"tables.safetensors", "constants.safetensors", "text_encoder.onnx"}:
        assert plain.files[file] == other.files[file]
    added = other.files.keys() - plain.files.keys()
    assert added == {"vae_encoder.onnx", other.start.graph.file}
    with opened(made("sd")) as pipe, opened(compiled("sd", steps=STEPS)) as before:
        asked = {"prompt": PROMPTS, "generator": 3, "output_type": "np"}
        assert np.array_equal(pipe(**asked).images, before(**asked).images)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": None, "mask_image": picture(16)}, "mask_image is given without image; give both, or neither"),
        ({"image": None}, "strength is given without image; give both, or neither"),
        ({"strength": 0}, "strength = 0; give a number above 0, up to 1"),
        ({"strength": 1.5}, "strength = 1.5; give a number above 0, up to 1"),
        ({"strength": 0.05}, "strength = 0.05 leaves none of 10 steps; give at least 0.1"),
        ({"image": picture(16, mode="RGBA")}, r"image is of mode RGBA; give image.convert\('RGB'\)"),
        ({"image": picture(20)}, "height 20, it takes 16; give that"),
        ({"image": np.zeros((16, 16), np.float32)}, "image is a ndarray; give a picture of PIL"),
        ({"image": np.full((16, 16, 3), 7.0)}, "image has values from 7 to 7; give numbers from 0 to 1"),
        ({"image": np.zeros((16, 16, 4))}, r"image is \[16, 16, 4\]; give \[height, width, channels\] of 3 channels"),
        ({"image": "a.png", "height": 16, "width": 16}, "image is a str; give a picture of PIL, an array or a tensor"),
        ({"image": []}, "image is an empty list; give a picture"),
        ({"image": [picture(16)] * 3}, "3 of image for 2 images; give one, one for each, or a number that divides it"),
        ({"latents": np.zeros((2, 4, 8, 8), np.float32)}, "both image and latents are given; a picture gets its noise"),
        ({"padding_mask_crop": 8}, "padding_mask_crop = 8, the bundle was compiled for None; leave it out"),
        ({"denoising_start": 0.5}, "denoising_start = 0.5, the bundle was compiled for None; leave it out"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_what_makes_no_sense_is_refused(changes, message):
    with opened(made("sd")) as bundle, misused(message):
        bundle(**arguments("sd", 0.6, False) | changes)


def test_bundles_without_pictures_say_how_to_get_them():
    one = compiled("sd")
    with opened(one) as bundle, misused(r"image: the bundle .* starts from noise alone; export it with --image"):
        bundle("a fox", image=picture(16))
    with misused(r"StableDiffusionImg2ImgPipeline: the bundle .* starts from noise alone; export it with --image"):
        dipgo.attach(of_pictures("sd", False), one.folder)
    done = command.dipgo("export", zoo_subnet("dit"), "--model", zoo.pipeline("dit"), "--image", "-o", "/nonexistent/b")
    assert done.code == 2
    assert "--image: DiTPipeline starts from noise alone; StableDiffusionPipeline, " in done.err


def zoo_subnet(kind):
    return open_bundle(compiled(kind, False).folder).folder / "subnet.json"


def test_the_command_line_takes_pictures(tmp_path):
    picture(20).save(tmp_path / "in.png")
    picture(20, 1, "L").save(tmp_path / "mask.png")
    (tmp_path / "no.png").write_text("nothing")
    options = ["--prompt", "a red fox", "--seed", 3, "--strength", 0.6, "-o", tmp_path / "out.png"]
    folder, both = made("sd").folder, ["--image", tmp_path / "in.png", "--mask", tmp_path / "mask.png"]
    done = command.dipgo("run", folder, *both, *options)
    assert done.code == 0, done.err
    asked = {"prompt": ["a red fox"], "image": picture(20), "mask_image": picture(20, 1, "L")}
    expected = gated_images("sd", 0.6, True, **asked)[0]
    with Image.open(tmp_path / "out.png") as image:
        assert np.abs(np.asarray(image) / 255 - expected).max() <= 0.6 / 255
    for wrong, message in (
        (["--mask", tmp_path / "mask.png"], "mask_image is given without image"),
        (["--image", tmp_path / "no.png"], "not a picture that can be read"),
        (["--image", tmp_path / "there.png"], "no such picture"),
    ):
        done = command.dipgo("run", folder, *wrong, *options, "--force")
        assert (done.code, done.err.count("\n")) != (0, 1)
        assert message in done.err
