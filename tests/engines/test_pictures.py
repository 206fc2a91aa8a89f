"""Image-to-image and inpainting: the images of diffusers' pipelines under the same gates, from the same step."""

from functools import cache

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import dipgo
from dipgo.eager.gating import gated
from dipgo.model.families.pictures import OF_PICTURES
from tests.checks import error
from tests.engines.dropin import compiled

STEPS = 10
PROMPTS = ["a red fox", "two dogs"]
STRENGTHS = (0.3, 0.6, 1.0)


@cache
def made(kind, sampler=None, keep=0.5):
    return compiled(kind, keep=keep, steps=STEPS, image=True, name=sampler)


@cache
def of_pictures(kind, masked, sampler=None):
    """Return the diffusers pipeline that starts from pictures, of the same components."""
    pipe = made(kind, sampler).pipe
    name = OF_PICTURES[type(pipe).__name__][masked]
    options = {"requires_safety_checker": False} if kind == "sd" else {}
    kind_of = getattr(diffusers, name)
    wanted = kind_of._get_signature_keys(kind_of)[0]
    parts = {name: part for name, part in pipe.components.items() if name in wanted}
    result = kind_of(**parts, **options)
    result.set_progress_bar_config(disable=True)
    return result


def first_call(kind, strength, order=1):
    if kind in ("sd", "sdxl"):
        return (STEPS - int(STEPS * strength)) * order
    return int(STEPS - STEPS * strength) * order


def picture(size, seed=0, mode="RGB"):
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).convert(mode)


def arguments(kind, strength, masked, seed=3, **changes):
    side = 32 if kind in ("flux", "sd3-16") else 16
    given = {"prompt": PROMPTS, "image": picture((side, side)), "strength": strength, "guidance_scale": 4.0}
    if masked:
        given["mask_image"] = picture((side, side), 1, "L")
    if kind == "flux":
        given |= {"height": 32, "width": 32}
    given |= {"num_inference_steps": STEPS, "generator": torch.Generator().manual_seed(seed), "output_type": "np"}
    return given | changes


@pytest.mark.parametrize("masked", [False, True], ids=["picture", "mask"])
@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3-16", "flux"])
def test_images_are_those_of_diffusers(kind, masked):
    """Of Stable Diffusion 3 with a mask the latents: decoding, diffusers leaves out what the VAE's config shifts by."""
    one, pipe = made(kind), of_pictures(kind, masked)
    form = {"output_type": "latent"} if masked and kind == "sd3-16" else {}
    with dipgo.load(one.folder) as bundle:
        bundle.set_progress_bar_config(disable=True)
        for strength in STRENGTHS:
            with gated(getattr(pipe, one.component), one.subnet, first_call(kind, strength)):
                expected = pipe(**arguments(kind, strength, masked, **form)).images
            plain = pipe(**arguments(kind, strength, masked, **form)).images
            images = bundle(**arguments(kind, strength, masked, **form)).images
            with dipgo.attach(pipe, bundle):
                attached = pipe(**arguments(kind, strength, masked, **form)).images
            assert error(images, expected) <= 1e-4
            assert error(attached, expected) <= 1e-4
            assert error(plain, expected) > 1e-3
