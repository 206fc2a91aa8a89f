"""Bundles of pipelines that are observed (FLUX.1, Stable Diffusion 3): called like the pipelines, without torch."""

import numpy as np
import pytest

import dipgo
from dipgo.base.errors import DipgoWarning
from tests import zoo
from tests.checks import error, misused
from tests.engines.dropin import compiled


@pytest.fixture(scope="module", params=["flux", pytest.param("flux-schnell", marks=pytest.mark.slow), "sd3"])
def made(request):
    return compiled(request.param)


@pytest.fixture(scope="module")
def pipe(made):
    with dipgo.load(made.folder) as pipe:
        pipe.set_progress_bar_config(disable=True)
        yield pipe


def test_images_of_prompts_are_those_of_the_gated_pipeline(made, pipe):
    """Prompts of several encoders with lengths of their own, embedded guidance, packed noise, a packed decoder."""
    for changes in (
        {},
        {"prompt": ["a red fox", "two dogs"]},
        {"num_images_per_prompt": 2},
        {"prompt_2": ["a hen", "", "a cat"]},
    ):
        assert error(made.call(pipe, **changes), made.expected(**changes)) <= 1e-4


@pytest.mark.parametrize("kind", zoo.some([("sana",), ("bria",), ("sd-pag",)], [("bria",)]))
def test_prompts_of_any_length_and_negative_ones(kind):
    """Negative prompts in another frame, texts as long as they are, a third pass that reads as the second does."""
    made = compiled(kind)
    asked = ({}, {"prompt": "a", "negative_prompt": "snow and fog"}, {"prompt": ["a red fox in the harbour", ""]})
    with dipgo.load(made.folder) as pipe:
        pipe.set_progress_bar_config(disable=True)
        for changes in asked:
            assert error(made.call(pipe, **changes), made.expected(**changes)) <= 1e-4


def test_guidance_where_a_negative_prompt_is_given():
    """Qwen-Image guides where there is a negative prompt, if an empty one; its scale is ``true_cfg_scale``."""
    made = compiled("qwen")
    silent = ({"negative_prompt": None}, {"negative_prompt": None, "true_cfg_scale": 1.0}, {"true_cfg_scale": 1.0})
    with dipgo.load(made.folder) as pipe:
        pipe.set_progress_bar_config(disable=True)
        for changes in ({}, {"negative_prompt": "two dogs in the snow"}, {"true_cfg_scale": 2.0}):
            assert error(made.call(pipe, **changes), made.expected(**changes)) <= 1e-4
        for changes in silent:
            assert error(made.call(pipe, **changes), made.expected(guided=False, **changes)) <= 1e-4
        with pytest.warns(DipgoWarning, match="no negative_prompt, so no guidance"):
            made.call(pipe, **silent[0])
        with misused("guidance_scale = 3.0; the model's pipeline calls it true_cfg_scale: give that"):
            made.call(pipe, guidance_scale=3.0)
    assert error(made.expected(), made.expected(guided=False, **silent[0])) > 1e-3


def test_other_latents_than_the_pipeline_packs_are_refused(made, pipe):
    shape = pipe.latent_shape(1)
    assert pipe.noise(1, 5).shape == shape
    with misused(r"latents are \[1, 3, 4\], this call is for"):
        made.call(pipe, latents=np.zeros((1, 3, 4), np.float32))


def test_one_size_alone(made, pipe):
    with misused("height 48, it takes 32"):
        made.call(pipe, height=48)


def test_latents_are_packed_as_the_pipeline_s(made, pipe):
    assert error(made.call(pipe, output_type="latent"), made.expected(output_type="latent")) <= 1e-4


def test_embeddings_stand_for_prompts(made, pipe):
    """Embedded guidance is the bundle's own."""
    prompts = ["a red fox", "two dogs"]
    names = ("prompt_embeds", "pooled_prompt_embeds")
    if made.component == "transformer" and hasattr(made.pipe, "text_encoder_3"):
        conditional, null, pooled, null_pooled = made.pipe.encode_prompt(prompts, prompts, prompts)
        given = {"negative_prompt_embeds": null, "negative_pooled_prompt_embeds": null_pooled}
        given |= dict(zip(names, (conditional, pooled), strict=True))
    else:
        given = dict(zip(names, made.pipe.encode_prompt(prompts, prompts)[:2], strict=True))
    expected = made.expected(prompt=prompts)
    assert error(made.call(pipe, prompt=None, **given), expected) <= 1e-4
