"""The text-to-image model that ships: diffusers loads it, it draws what it is told, and it compiles in every layout."""

import json

import numpy as np
import pytest
from PIL import Image

from benchmarks.bench.parity import TOLERANCE, verify
from benchmarks.bench.subjects import inputs_for
from dipgo.graph.trace import trace
from dipgo.model.models import find_model
from dipgo.model.sampler import make_scheduler, tabulate
from export.bundle import open_bundle
from export.compiler import prepare, write_bundle
from export.config import ExportConfig
from export.plan.layouts import LAYOUTS
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
    prepared, subnet = prepare(traced), random_subnet(traced, sampler, seed=2, terms=2, channels=2)
    folder = tmp_path_factory.mktemp("emoji")
    for layout in LAYOUTS:
        write_bundle(prepared, subnet, sampler, folder / layout, config=ExportConfig(graphs=layout))
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
def test_reports_show_names_of_its_own(bundles, model):
    conditioning = open_bundle(bundles["signature"]).record.conditioning
    assert 16 <= len(conditioning.prompts) <= 32
    assert set(conditioning.prompts) <= set(model.prompts())
    assert inputs_for(conditioning, 40)[:3] == conditioning.prompts[:3]
