"""What is observed of a pipeline equals what is known of it, and what cannot be made again is refused."""

import json
import shutil
from copy import copy
from functools import wraps

import numpy as np
import pytest
import torch

from dipgo.model.families import GuidedDenoiser, join
from dipgo.model.families.observed import family_of_observed
from dipgo.model.observed.request import Request
from dipgo.model.sampler import make_scheduler
from dipgo.model.skeleton import _component, skeleton
from tests import zoo
from tests.checks import error, misused

PROMPTS = ["a cat", "two dogs in the rain"]


@pytest.mark.parametrize("kind", ["sd", "sd-v", "sdxl", "pixart", "pixart-1024", "pixart-sigma"])
def test_registered_families_are_observed_as_they_are_known(kind):
    """The same table, the same conditions up to constants, and the same guided ε."""
    model = zoo.model(kind)
    pipe = model.pipeline()
    known, seen = model.family, family_of_observed(pipe, model.family.component, Request(guidance=4.0))
    scheduler = make_scheduler("ddim", model.scheduler)
    tables = [family.table(scheduler, 5) for family in (known, seen)]
    assert tables[0].timesteps == tables[1].timesteps
    assert np.allclose(tables[0].rows, tables[1].rows, atol=1e-6)
    torch.manual_seed(0)
    latent, denoiser = torch.randn(model.latent_shape(2)), getattr(pipe, known.component)
    outputs = []
    for family in (known, seen):
        with torch.no_grad():
            conditions = join(*family.conditions(pipe, PROMPTS), True)
            outputs.append(GuidedDenoiser(denoiser, family, 4.0)(latent, torch.full((2,), 300.0), conditions))
    assert error(outputs[1].numpy(), outputs[0].numpy()) <= 1e-5
    vae = pipe.vae.config
    assert torch.allclose(seen.to_vae(latent, vae), known.to_vae(latent, vae), atol=1e-5)
    assert torch.allclose(seen.from_vae(seen.to_vae(latent, vae), vae), latent, atol=1e-5)


def test_flux_is_packed_shifted_by_its_size_and_guided_by_a_condition():
    small, large = (zoo.model("flux").at(4.0, pixels).family for pixels in ((32, 32), (64, 64)))
    scheduler = make_scheduler(None, zoo.model("flux").scheduler)
    tables = [family.table(scheduler, 4) for family in (small, large)]
    assert tables[0].timesteps != tables[1].timesteps
    assert [table.pixels for table in tables] == [(32, 32), (64, 64)]
    assert small.latent({}) == (64, 16)
    assert small.noise.before == [4, 16, 16]
    assert not small.guides(4.0)
    assert small.fixed["guidance"].tolist() == [4.0]
    assert zoo.model("flux").at(2.5).family.fixed["guidance"].tolist() == [2.5]


def test_texts_are_no_longer_than_t5_says():
    """CLIP's tokenizer, which has a length of its own, does not count; nor does a T5 that takes more than the call."""
    pipe = zoo.model("flux").pipeline()
    for limit, length in ((24, 24), (1000, 512)):
        pipe.tokenizer_2.model_max_length = limit
        family = family_of_observed(copy(pipe), "transformer", Request(size=(32, 32)))
        conditions = family.example(pipe.transformer.config, 1)
        assert conditions["encoder_hidden_states"].shape == (1, length, 12)
        assert family.prompting(pipe.transformer.config).lengths == (77, length)


def test_without_guidance_there_is_one_pass():
    family = zoo.model("sd3").at(1.0).family
    assert not family.guides(1.0)
    assert all(len(value) == 1 for value in family.example({}, 1).values())


def test_a_loop_that_changes_latents_by_itself_is_refused():
    pipe = zoo.model("sana").pipeline()
    prepare = pipe.prepare_latents
    pipe.prepare_latents = lambda *args, **kwargs: prepare(*args, **kwargs).abs()
    with misused("SanaPipeline makes its first latent of noise in a way of its own"):
        family_of_observed(pipe, "transformer", Request())


def test_guidance_of_its_own_is_refused():
    pipe = zoo.model("sana").pipeline()
    step = pipe.scheduler.step

    def squared(output, *args, **kwargs):
        return step(output * output.abs(), *args, **kwargs)

    pipe.scheduler.step = squared
    family = family_of_observed(pipe, "transformer", Request())
    with misused("not linear as configured"):
        family.table(pipe.scheduler, 4)


def test_videos_that_are_made_piece_by_piece_are_refused():
    pipe = copy(zoo.task("sd", 4).pipe)

    class Pieces(type(pipe)):
        @wraps(type(pipe).__call__)
        def __call__(self, *args, **kwargs):
            super().__call__(*args, **kwargs)
            return super().__call__(*args, **kwargs)

    pipe.__class__ = Pieces
    with misused("it goes on with new noise after it has decoded latents, piece by piece"):
        family_of_observed(pipe, "unet", Request())


def test_networks_that_nobody_stands_in_for_are_refused(tmp_path):
    """What such a one makes of the prompt would be that of its missing weights."""
    folder = tmp_path / "sd"
    shutil.copytree(zoo.pipeline("sd"), folder)
    zoo.task("sd", 4).pipe.unet.save_pretrained(folder / "adapter_net")
    index = json.loads((folder / "model_index.json").read_text())
    pipe = skeleton(folder, index)

    class Helped(type(pipe)):
        @wraps(type(pipe).__call__)
        def __call__(self, *args, **kwargs):
            self.helper(torch.zeros(1, 4, 8, 8), 0, torch.zeros(1, 77, 24))
            return super().__call__(*args, **kwargs)

    helper = _component(folder, "adapter_net", "diffusers", "UNet2DConditionModel", "StableDiffusionPipeline")
    pipe.__class__, pipe.__dict__["helper"] = Helped, helper
    with misused("it calls a network of its own, its adapter_net"):
        family_of_observed(pipe, "unet", Request())
