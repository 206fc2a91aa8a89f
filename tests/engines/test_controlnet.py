"""ControlNets: one denoiser with the UNet, whose images are those of diffusers' pipelines, loaded and attached."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

import dipgo
from benchmarks.bench.parity import verify
from dipgo.base.control import kept
from dipgo.base.records import read_json
from dipgo.eager.gating import gated
from dipgo.model.models import find_model
from tests import models, zoo
from tests.checks import error, misused

STEPS = 4
REQUESTS = [
    {"controlnet_conditioning_scale": 0.0},
    {"controlnet_conditioning_scale": 0.5},
    {"controlnet_conditioning_scale": 1.0},
    {"control_guidance_end": 0.5},
    {"control_guidance_start": 0.3, "controlnet_conditioning_scale": 1.5, "guidance_scale": 7.0},
    {"control_guidance_end": 0.5, "guidance_scale": 1.0},
]
KINDS = zoo.some([("controlnet",), ("controlnets",), ("sdxl-controlnet",)], [("controlnet",)])


class Made:
    """A pipeline with ControlNets, and two programs of it: everything computed, and half of it skipped."""

    def __init__(self, kind: str) -> None:
        traced = zoo.trace(kind, open_guidance=True)
        self.family, self.pipe = traced.model.family, traced.model.pipeline()
        self.pipe.set_progress_bar_config(disable=True)
        table = zoo.sampler(kind, STEPS, None)
        half = models.random_subnet(traced, table, seed=0, terms=2, channels=1)
        full = half.under(replace(half.schedule, gates=np.ones_like(half.gates)), traced)
        self.subnets = (full, half)
        self.bundles = [zoo.bundle(traced, table, each) for each in self.subnets]
        self.nets = len(traced.model.config["controlnets"])

    @property
    def pictures(self) -> Any:
        """Pictures of another size than the images, which are resized."""
        drawn = np.random.default_rng(0).integers(0, 256, (self.nets, 20, 18, 3), np.uint8)
        pictures = [Image.fromarray(each) for each in drawn]
        return pictures if self.nets > 1 else pictures[0]

    def call(self, pipe: Any, **changes: Any) -> Any:
        usual = {"prompt": "a red fox", "height": 16, "width": 16, "num_inference_steps": STEPS, "guidance_scale": 4.0}
        usual |= {"image": self.pictures, "output_type": "np", "generator": torch.Generator().manual_seed(0)}
        return pipe(**usual | changes).images

    def expected(self, program: int) -> list[Any]:
        """Return the images of all requests under the gates."""
        with torch.no_grad(), gated(self.family.denoiser(self.pipe), self.subnets[program]):
            return [self.call(self.pipe, **request) for request in REQUESTS]


made = cache(Made)


@pytest.mark.parametrize("program", [0, 1], ids=["full", "half"])
@pytest.mark.parametrize("kind", KINDS)
def test_images_are_those_of_the_gated_pipeline(kind, program):
    """At each scale and share of the steps; between these the ControlNet makes a difference."""
    own = made(kind)
    expected, bundle = own.expected(program), own.bundles[program]
    assert all(error(other, expected[2]) > 1e-3 for other in (expected[0], expected[1], expected[3]))
    loaded = dipgo.load(bundle)
    for request, images in zip(REQUESTS, expected, strict=True):
        assert error(own.call(loaded, **request), images) <= 1e-4
    controlnet = own.pipe.controlnet
    with dipgo.attach(own.pipe, bundle) as pipe:
        for request, images in zip(REQUESTS, expected, strict=True):
            assert error(own.call(pipe, **request), images) <= 1e-4
    assert own.pipe.controlnet is controlnet


def test_several_prompts_have_pictures_of_their_own():
    own = made("controlnet")
    pictures = np.random.default_rng(1).random((2, 16, 16, 3), np.float32)
    prompts = {"prompt": ["a", "b"], "image": pictures, "num_images_per_prompt": 2}
    with torch.no_grad(), gated(own.family.denoiser(own.pipe), own.subnets[1]):
        expected = own.call(own.pipe, **prompts)
    assert error(own.call(dipgo.load(own.bundles[1]), **prompts), expected) <= 1e-4


def test_sites_lie_in_both_networks_and_verify_holds():
    own = made("controlnet")
    names = {site.name for site in own.subnets[1].sites}
    assert {"up_blocks.0", "controlnet.down_blocks.0", "controlnet.mid_block"} <= names
    parity = verify(own.bundles[1])
    assert parity.passed
    assert parity.relative_error_image <= 1e-5


def test_steps_outside_of_a_share_are_left_out():
    assert kept(5, 0.0, 0.5).tolist() == [1, 1, 0, 0, 0]
    assert kept(4, 0.3, 1.0).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": None}, "has a ControlNet; give its picture as image, 16x16"),
        ({"image": np.zeros((8, 8, 3))}, r"image is \[8, 8, 3\]; give \[16, 16, 3\], or several"),
        ({"image": torch.full((1, 3, 16, 16), 2.0)}, "image has values from 2 to 2; give numbers from 0 to 1"),
        ({"image": "a.png"}, "image is a str; give a picture of PIL"),
        ({"height": None, "width": None}, "height 20, it takes 16"),
        ({"image": [Image.new("RGB", (16, 16))] * 3}, "3 control pictures for 1 prompts"),
        ({"guess_mode": True}, "guess_mode = True"),
        ({"controlnet_conditioning_scale": [1.0, 2.0]}, r"controlnet_conditioning_scale = \[1.0, 2.0\]; give a number"),
        ({"control_guidance_start": 0.6, "control_guidance_end": 0.5}, "give 0 <= start < end <= 1"),
    ],
)
def test_what_a_controlnet_cannot_take_is_refused(changes, message):
    own = made("controlnet")
    with misused(message):
        own.call(dipgo.load(own.bundles[1]), **changes)


def test_other_pipelines_take_no_such_bundle():
    own = made("controlnet")
    plain = StableDiffusionPipeline.from_pretrained(zoo.pipeline("sd"))
    with misused("the pipeline has no ControlNet, the bundle was compiled with 1"):
        dipgo.attach(plain, own.bundles[1])
    bias = own.pipe.controlnet.conv_in.bias
    with torch.no_grad():
        bias[0] += 1
    try:
        with misused("the denoiser's 'controlnet.conv_in.bias'"):
            dipgo.attach(own.pipe, own.bundles[1])
    finally:
        with torch.no_grad():
            bias[0] -= 1


def test_a_controlnet_of_another_model_is_refused(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(zoo.pipeline("controlnet"), folder)
    file = folder / "controlnet" / "config.json"
    text = file.read_text()
    assert read_json(file, "configuration")["cross_attention_dim"] == 24
    file.write_text(text.replace('"cross_attention_dim": 24', '"cross_attention_dim": 32'))
    with misused("another model's: its cross_attention_dim is 32, the UNet's 24"):
        find_model(str(folder))
