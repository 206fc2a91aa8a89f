"""The model in torch: its loop against the program's, its count of MACs against the trace's, what caches do to it."""

from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from diffusers import StableDiffusionPipeline

from benchmarks.bench.parity import verify
from benchmarks.bench.quality import latent_error
from benchmarks.bench.subjects import IMAGE_SEED, PROMPTS, ProgramSpec, ProgramSubject, TorchSpec
from benchmarks.bench.techniques import TECHNIQUES, Technique, cache_dit, first_block_cache
from benchmarks.bench.torch_subject import TorchSubject
from benchmarks.failures import NotMeasuredError
from export.bundle import open_bundle
from tests import zoo
from tests.models import random_subnet

STEPS = 6


@dataclass(frozen=True)
class Made:
    """A bundle that computes everything, and the folder of its model."""

    bundle: Path
    model: str
    macs: int


@cache
def made(kind, sampler=None):
    task = zoo.task(kind, STEPS, sampler)
    folder = zoo.bundle(task.trace, task.sampler, random_subnet(task.trace, task.sampler, seed=0, keep=1.0))
    return Made(folder, zoo.pipeline(kind), open_bundle(folder).record.macs)


def subject(found, technique):
    return TorchSubject(TorchSpec(bundle=str(found.bundle), model=found.model, technique=technique, threads=1))


@pytest.mark.parametrize(("kind", "sampler"), [("sd", None), ("sd", "euler-a"), ("dit", None)])
def test_eager_torch_does_what_the_full_program_does(kind, sampler):
    found = made(kind, sampler)
    eager = subject(found, "eager torch")
    program = ProgramSubject(ProgramSpec(folder=str(found.bundle), backend="onnxruntime", threads=1))
    assert latent_error(eager.loop(), program.loop()) < 1e-4
    for own, theirs in zip(eager.generate(1, 2, IMAGE_SEED), program.generate(1, 2, IMAGE_SEED), strict=True):
        assert latent_error(own, theirs) < 1e-4
    assert eager.macs() == found.macs
    assert len(eager.steps()) == len(program.steps())
    program.close()
    assert verify(found.bundle, found.model).passed


def test_deep_cache_is_the_packages_own():
    """Against the package in the diffusers pipeline itself, and counted: every third call is whole."""
    sd = made("sd")
    helpers = pytest.importorskip("DeepCache")
    cached = subject(sd, "DeepCache, N = 3")
    first, again = cached.loop(), cached.loop()
    assert np.array_equal(first, again)  # nothing of one trajectory is left in the next
    assert 0.3 * sd.macs < cached.macs() < 0.6 * sd.macs

    pipe = StableDiffusionPipeline.from_pretrained(sd.model)
    pipe.set_progress_bar_config(disable=True)
    helper = helpers.DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=3, cache_branch_id=0)
    helper.enable()
    latents, _ = cached.generate(0, 1, IMAGE_SEED)
    noise = cached._noise_of(1, IMAGE_SEED)
    options = {"num_inference_steps": STEPS, "guidance_scale": 4.0, "output_type": "latent"}
    own = pipe(PROMPTS[0], latents=noise, **options).images
    assert latent_error(latents, own.numpy()) < 1e-4


@pytest.mark.parametrize("kind", ["sd", "dit"])
def test_attention_broadcast_computes_less(kind):
    found = made(kind)
    cached = subject(found, "diffusers PyramidAttentionBroadcast")
    first = cached.loop()
    assert np.array_equal(first, cached.loop())
    assert cached.macs() < found.macs


def test_first_block_cache_forgets_between_trajectories(monkeypatch):
    """Where everything counts as unmoved, only the first step of each trajectory is whole."""
    dit = made("dit")
    name = "diffusers FirstBlockCache"
    monkeypatch.setitem(TECHNIQUES, name, Technique(partial(first_block_cache, threshold=1e6)))
    cached = subject(dit, name)
    first = cached.loop()
    assert np.array_equal(first, cached.loop())
    assert dit.macs / STEPS < cached.macs() < 0.8 * dit.macs
    assert latent_error(first, subject(dit, "eager torch").loop()) > 1e-3


@pytest.mark.parametrize("kind", ["dit", pytest.param("pixart", marks=pytest.mark.slow)])
def test_cache_dit_computes_less_and_forgets_between_trajectories(kind, monkeypatch):
    """Where everything counts as unmoved: it warms up for four of the six steps."""
    pytest.importorskip("cache_dit")
    found = made(kind)
    monkeypatch.setitem(TECHNIQUES, "cache-dit", Technique(partial(cache_dit, threshold=1e6)))
    cached = subject(found, "cache-dit")
    first = cached.loop()
    assert np.array_equal(first, cached.loop())
    assert found.macs * 4 / STEPS < cached.macs() < found.macs
    assert 1e-6 < latent_error(first, subject(found, "eager torch").loop()) < 1


@pytest.mark.slow
def test_compiled_torch_does_what_eager_torch_does():
    found = made("dit")
    assert latent_error(subject(found, "torch.compile").loop(), subject(found, "eager torch").loop()) < 1e-4


def test_one_that_does_not_fit_says_so():
    if find_spec("cache_dit"):
        with pytest.raises(NotMeasuredError, match="cache-dit does not know UNet2DConditionModel"):
            subject(made("sd"), "cache-dit")
    for kind, technique in (("dit", "DeepCache, N = 3"), ("sd", "diffusers FirstBlockCache")):
        with pytest.raises(NotMeasuredError, match=r"(DeepCache is for UNets|FirstBlockCache is for transformers)"):
            subject(made(kind), technique)
