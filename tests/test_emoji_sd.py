"""The text-to-image model that ships: diffusers loads it, it draws what it is told, and it compiles in every layout."""

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline
from PIL import Image

from benchmarks.bench.parity import TOLERANCE, verify
from benchmarks.bench.subjects import inputs_for
from dipgo.eager.gating import gated
from dipgo.graph.trace import trace
from dipgo.model.models import find_model
from dipgo.model.sampler import make_scheduler, tabulate
from dipgo.schedule.subnet import load_subnet
from engines.pipeline.pipeline import load
from export.bundle import open_bundle
from export.compiler import prepare, write_bundle
from export.config import ExportConfig
from export.plan.layouts import LAYOUTS
from tests.checks import error
from tests.command import dipgo
from tests.models import random_subnet
from training.emoji_model import sample

STEPS = 4


@pytest.fixture(scope="module")
def model():
    return find_model("emoji-sd")


@pytest.fixture(scope="module")
def bundles(model, tmp_path_factory):
    """One random SubNet with learned backups, in every layout."""
    traced = trace(model, "layer", 4.0)
    sampler = tabulate(make_scheduler("ddim", model.pipeline().scheduler), STEPS)
    prepared, subnet = prepare(traced, image=True), random_subnet(traced, sampler, seed=2, terms=2, channels=2)
    folder = tmp_path_factory.mktemp("emoji")
    for layout in LAYOUTS:
        write_bundle(prepared, subnet, sampler, folder / layout, config=ExportConfig(graphs=layout, image=True))
    return {layout: folder / layout for layout in LAYOUTS}


def test_it_fits_the_repository_and_brings_its_names(model):
    assert sum(path.stat().st_size for path in model.folder.rglob("*")) < 40e6
    names = json.loads((model.folder / "held-out.json").read_text())
    assert model.prompts() == names["training"]
    assert not {*names["training"]} & {*names["held_out"]}


def test_it_draws_what_it_is_told(model):
    """By diffusers alone: a heart, an apple and a circle have the colours of their names."""
    wanted = {"red heart": 0, "green apple": 1, "large blue circle": 2}
    assert set(wanted) <= set(model.prompts())
    images = sample(model.pipeline(), list(wanted), 20, guidance=4.0)
    for image, channel in zip(images, wanted.values(), strict=True):
        middle = image[:, 24:40, 24:40].mean((1, 2))
        assert middle.argmax() == channel
        assert middle[channel] - middle.sort().values[0] > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_it_equals_diffusers(bundles, layout):
    parity = verify(bundles[layout], images=1)
    assert max(parity.relative_error_latent, parity.relative_error_image) <= TOLERANCE


@pytest.mark.slow
def test_a_prompt_becomes_a_picture(bundles, tmp_path):
    made = []
    for prompt in ("red heart", "green apple"):
        file = tmp_path / f"{prompt}.png"
        assert dipgo("run", bundles["signature"], "--prompt", prompt, "--seed", "3", "-o", file).code == 0
        with Image.open(file) as picture:
            made.append(np.asarray(picture))
    assert made[0].shape == (64, 64, 3)
    assert not np.array_equal(*made)


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
def test_it_starts_from_a_picture_as_diffusers_does(bundles, model, masked):
    kind = StableDiffusionInpaintPipeline if masked else StableDiffusionImg2ImgPipeline
    subnet = load_subnet(bundles["signature"] / "subnet.json")
    parts = model.pipeline().components
    parts["scheduler"] = make_scheduler("ddim", parts["scheduler"])
    pipe = kind(**parts, requires_safety_checker=False)
    given = {"prompt": "red heart", "image": Image.fromarray(np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3))}
    given |= {"mask_image": Image.fromarray(np.uint8(255 * np.tri(64)))} if masked else {}
    given |= {"num_inference_steps": STEPS, "guidance_scale": 4.0, "output_type": "np"}
    with load(bundles["signature"]) as bundle:
        for strength in (0.3, 0.6, 1.0):
            with gated(pipe.unet, subnet, STEPS - int(STEPS * strength)):
                expected = pipe(**given, strength=strength, generator=torch.Generator().manual_seed(1)).images
            assert error(bundle(**given, strength=strength, generator=1).images, expected) <= 1e-3


@pytest.mark.slow
def test_reports_show_names_of_its_own(bundles, model):
    conditioning = open_bundle(bundles["signature"]).record.conditioning
    assert 16 <= len(conditioning.prompts) <= 32
    assert set(conditioning.prompts) <= set(model.prompts())
    assert inputs_for(conditioning, 40)[:3] == conditioning.prompts[:3]
