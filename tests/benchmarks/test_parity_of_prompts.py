"""Parity of what takes prompts, embeddings or nothing, and of half precision; and that wrong bundles are caught."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import dipgo
from benchmarks.bench.candidates import parity_failure
from benchmarks.bench.parity import TOLERANCE, measure, verify
from benchmarks.bench.reference import cast_pipeline, model_of
from benchmarks.bench.subjects import PROMPTS, inputs_of
from dipgo.base.progress import silent
from dipgo.model.models import find_model
from export.bundle import open_bundle
from export.compiler import compile_subnet
from export.config import ExportConfig
from tests import zoo
from tests.benchmarks.test_parity import scale_a_weight
from tests.models import random_subnet

STEPS = 4


def bundle_of(kind, batch=1, dtype=torch.float32):
    """Half of the gates off, backups of two outputs weighted by channel."""
    traced, sampler = zoo.trace(kind, dtype=dtype), zoo.sampler(kind, STEPS, None)
    return zoo.bundle(traced, sampler, random_subnet(traced, sampler, seed=2, terms=2, channels=1), batch=batch)


@pytest.fixture(scope="module", params=["sd", pytest.param("sdxl", marks=pytest.mark.slow), "pixart"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def model(kind):
    return zoo.model(kind)


@pytest.fixture(scope="module")
def compiled(kind):
    """For two images a call; not to be changed."""
    return bundle_of(kind, batch=2)


def test_prompts_have_the_parity_of_the_gated_pipeline(compiled):
    """Three images, the last batch of which is not full."""
    parity = verify(compiled, images=3, seed=5, progress=silent)
    assert parity.passed
    assert 0 < parity.relative_error_latent < TOLERANCE
    assert 0 < parity.relative_error_image < TOLERANCE
    assert (parity.images, parity.seed, parity.dtype, parity.tolerance) == (3, 5, "float32", TOLERANCE)
    assert parity.tolerance_image is None
    with dipgo.load(compiled) as program:
        assert inputs_of(program, 6) == [*PROMPTS, *PROMPTS[:2]]


@pytest.mark.parametrize(
    ("file", "weight", "seen"),
    [
        ("text_encoder/model.safetensors", "layer_norm.weight", "latent"),
        ("vae/diffusion_pytorch_model.safetensors", "decoder.conv_out.weight", "image"),
    ],
)
def test_altered_components_are_caught(kind, compiled, model, tmp_path, file, weight, seen):
    if kind == "sd" and "text" in file:
        weight = "final_layer_norm.weight"
    copy = tmp_path / "altered"
    shutil.copytree(compiled, copy)
    scale_a_weight(copy, file, weight, 2.0)
    with dipgo.load(copy, threads=1) as program:
        parity = measure(program, model.pipeline())
    assert not parity.passed
    assert (parity.relative_error_latent > TOLERANCE) == (seen == "latent")
    assert parity.relative_error_image > TOLERANCE


def test_what_pipelines_do_to_finished_images_does_not_count(kind, compiled, model):
    """SDXL's watermark, and Stable Diffusion's checker, which blackens images, are no part of the program."""
    pipe = model.pipeline()

    class Blackens:
        def apply_watermark(self, images):
            return torch.zeros_like(images)

        def __call__(self, images, clip_input):
            return np.zeros_like(images), [True] * len(images)

    name = {"sd": "safety_checker", "sdxl": "watermark"}.get(kind)
    if name is None:
        assert not hasattr(pipe, "safety_checker")
        return
    blackens = Blackens()
    pipe.__dict__[name] = blackens
    with dipgo.load(compiled, threads=1) as program:
        assert measure(program, pipe, images=1).passed
    assert getattr(pipe, name) is blackens


@pytest.mark.parametrize("name", zoo.some([("dit",), ("sd",), ("pixart",)], {("dit",)}))
def test_half_precision_is_judged_by_its_own_rounding(name, tmp_path):
    model, folder = zoo.model(name), tmp_path / "bundle"
    shutil.copytree(bundle_of(name, dtype=torch.float16), folder)
    parity = verify(folder, progress=silent)
    assert parity.passed
    assert parity.dtype == "float16"
    assert TOLERANCE < parity.relative_error_latent <= parity.tolerance < 0.02
    assert parity.relative_error_image <= parity.tolerance_image < 0.02
    assert parity.tolerance == 2 * parity.rounding_latent + TOLERANCE
    assert parity.tolerance_image == 2 * parity.rounding_image + TOLERANCE
    assert parity.line().endswith("(float16)")

    cast = next((folder / model.family.component).iterdir()).relative_to(folder)
    scale_a_weight(folder, str(cast), "attn1.to_v.weight", 1.5)
    parity = verify(folder, progress=silent)
    assert not parity.passed
    assert "parity failed, relative error" in parity_failure(parity)


def test_a_pipeline_in_half_precision_is_a_copy():
    model = zoo.model("pixart")
    pipe = model.pipeline()
    half = cast_pipeline(pipe, torch.float16)
    assert {part.dtype for part in (pipe.transformer, pipe.vae, pipe.text_encoder)} == {torch.float32}
    assert {part.dtype for part in (half.transformer, half.vae, half.text_encoder)} == {torch.float16}
    loaded = type(pipe).from_pretrained(model.folder, torch_dtype=torch.float16)
    for name in ("transformer", "vae", "text_encoder"):  # T5 keeps some of its weights in float32
        mine, theirs = getattr(half, name).state_dict(), getattr(loaded, name).state_dict()
        assert {key: value.dtype for key, value in mine.items()} == {key: value.dtype for key, value in theirs.items()}
        assert all(torch.equal(value, theirs[key]) for key, value in mine.items())
    sdxl = zoo.model("sdxl").pipeline()
    assert cast_pipeline(sdxl, torch.float16).vae is sdxl.vae  # its pipeline decodes in float32


@pytest.mark.parametrize("short", zoo.some([("fp32",), ("fp16",)], {}))
def test_random_weights_are_verified_by_embeddings(short, tmp_path):
    """An architecture: no weights, no text encoder, in the pipeline's folder."""
    folder = tmp_path / "model"
    shutil.copytree(zoo.pipeline("sd"), folder)
    for part in ("text_encoder", "tokenizer"):
        shutil.rmtree(folder / part)
    for part in ("unet", "vae"):
        (folder / part / "diffusion_pytorch_model.safetensors").unlink()
    model = find_model(str(folder), random_weights=True)
    bundle = tmp_path / "bundle"
    traced, sampler = replace(zoo.trace("sd"), model=model), zoo.sampler("sd", STEPS, None)
    subnet = random_subnet(traced, sampler, seed=2, terms=2, channels=1)
    record = compile_subnet(subnet, model, bundle, ExportConfig(dtype=short))
    assert record.random_weights
    assert record.conditioning.encoder is None
    drawn = load_file(next((bundle / "unet").iterdir()))
    for name, parameter in model.pipeline().unet.named_parameters():
        assert torch.equal(drawn[name], parameter.to(drawn[name].dtype))
    assert verify(bundle, progress=silent).passed
    with dipgo.load(bundle) as program:
        assert model_of(program.bundle).random_weights

    file = next(path for path in (bundle / "unet").iterdir()).relative_to(bundle)
    scale_a_weight(bundle, str(file), "attn2.to_v.weight", 3.0)
    assert not verify(bundle, progress=silent).passed


@pytest.mark.parametrize("name", ["unconditional", "sana"])
def test_classes_of_denoiser_without_an_entry(name):
    bundle = bundle_of(name)
    record = open_bundle(bundle).record
    assert (record.conditioning.encoder is None) == (name == "unconditional")
    assert (record.decoder is None) == (name == "unconditional")
    parity = verify(bundle, progress=silent)
    assert parity.passed
    assert parity.relative_error_latent > 0
    assert parity.relative_error_image > 0
