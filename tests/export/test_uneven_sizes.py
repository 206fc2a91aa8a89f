"""Sizes that the levels of a UNet do not divide, such as 520x768 pixels: as diffusers takes them."""

import numpy as np
import pytest
import torch

import dipgo
from dipgo.base.errors import UsageError
from dipgo.eager.gating import gated
from dipgo.model.models import find_model
from dipgo.searching.task import make_task
from export.compiler import compile_subnet
from export.config import ExportConfig
from export.sizes import sizes_for
from tests import models, zoo
from tests.checks import error
from tests.models import random_subnet


@pytest.mark.parametrize("kind", ["sd", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_images_are_those_of_the_gated_pipeline(kind, tmp_path):
    original = zoo.model(kind).pipeline()
    parts = original.components | {"vae": models.vae(8)}  # of eight pixels a cell, as real ones
    options = {"requires_safety_checker": False} if kind == "sd" else {"add_watermarker": False}
    type(original)(**parts, **options).save_pretrained(tmp_path / "m")
    model = find_model(str(tmp_path / "m"))
    task = make_task(model, 4, guidance_scale=4.0)
    subnet = random_subnet(task.trace, task.sampler, seed=1)
    pipe = task.pipe
    pipe.set_progress_bar_config(disable=True)
    size, arguments = (24, 40), {"guidance_scale": 4.0, "num_inference_steps": 4, "output_type": "np"}
    compile_subnet(subnet, model, tmp_path / "bundle", ExportConfig(size="24x40"))
    with gated(pipe.unet, subnet):
        generator = torch.Generator().manual_seed(3)
        expected = pipe("a red fox", generator=generator, height=size[0], width=size[1], **arguments).images
    with dipgo.load(tmp_path / "bundle") as program:
        assert program.size == size
        images = program("a red fox", generator=3, **arguments).images
        assert images.shape == (1, *size, 3)
        assert error(images, expected) <= 1e-4
        assert np.isfinite(images).all()


def test_ranges_and_other_families_keep_to_their_multiples():
    assert sizes_for(zoo.model("sd"), 1, "18").latent == [1, 4, 9, 9]
    for kind, size, message in (
        ("sd", "19", "takes multiples of 2 pixels; 20 is near to 19"),
        ("sd", "18:26", "takes multiples of 8 pixels; 16 is near to 18"),
        ("dit", "9", "takes multiples of"),
    ):
        with pytest.raises(UsageError, match=message):
            sizes_for(zoo.model(kind), 1, size)
