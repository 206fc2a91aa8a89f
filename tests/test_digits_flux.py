"""The flow-matching model that ships: diffusers loads it, it draws what it is told, and its bundle does the same."""

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline

import dipgo
from benchmarks.bench.digit_classifier import digit_of, load_classifier
from dipgo.graph.trace import trace
from dipgo.model.models import find_model
from export.compiler import prepare, write_bundle
from tests.checks import misused
from tests.models import random_subnet
from training.flux_model import GUIDANCE, LENGTH, sample

STEPS = 4


@pytest.fixture(scope="module")
def model():
    return find_model("digits-flux")


@pytest.fixture(scope="module")
def pipe(model):
    """Loaded by diffusers alone."""
    pipe = FluxPipeline.from_pretrained(model.folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def bundle(model, tmp_path_factory):
    """Of every gate: the full program."""
    traced = trace(model, "layer", GUIDANCE)
    sampler = model.family.table(model.pipeline().scheduler, STEPS)
    subnet = random_subnet(traced, sampler, seed=0, keep=1.0)
    folder = tmp_path_factory.mktemp("digits-flux") / "bundle"
    write_bundle(prepare(traced), subnet, sampler, folder)
    return folder


def test_it_is_small_and_in_the_format_of_flux(model, pipe):
    assert sum(path.stat().st_size for path in model.folder.rglob("*")) < 10e6
    assert pipe.transformer.config.guidance_embeds
    assert pipe.transformer.config.in_channels == 4 * pipe.vae.config.latent_channels == 64
    assert pipe.vae.config.shift_factor
    assert pipe.scheduler.config.use_dynamic_shifting
    assert model.family.pixels == (32, 32)
    assert len(model.prompts()) == 90


def test_it_draws_what_it_is_told(model, pipe):
    prompts = model.prompts()[:30]
    images = sample(pipe, prompts, steps=14)
    with torch.no_grad():
        read = load_classifier()(images.mean(1, keepdim=True)).argmax(1).tolist()
    right = [digit == digit_of(prompt) for digit, prompt in zip(read, prompts, strict=True)]
    assert sum(right) >= 28


def test_a_bundle_draws_the_pipelines_images(pipe, bundle):
    prompts = ["a handwritten three, bold", "the slanted digit 7"]
    size = {"height": 32, "width": 32, "max_sequence_length": LENGTH}
    drawn = []
    for own in (pipe, dipgo.load(bundle)):
        noise = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
        drawn.append(own(prompts, num_inference_steps=STEPS, generator=noise, output_type="np", **size).images)
    assert np.linalg.norm(drawn[1] - drawn[0]) <= 1e-4 * np.linalg.norm(drawn[0])


def test_texts_of_another_length_are_refused(pipe, bundle):
    with dipgo.attach(pipe, bundle), misused("max_sequence_length = 512, the bundle was compiled for 16; ask for that"):
        pipe("three", height=32, width=32, num_inference_steps=STEPS)
    with misused("max_sequence_length = 512, the bundle was compiled for 16; ask for that"):
        dipgo.load(bundle)("three", max_sequence_length=512)
