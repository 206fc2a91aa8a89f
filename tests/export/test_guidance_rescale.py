"""Guidance that is rescaled, as models with a terminal SNR of zero want it: compiled, and checked like the scale."""

import pytest
import torch

import dipgo
from dipgo.base.errors import UsageError
from dipgo.base.guidance import GuidanceScale, guidance_of
from dipgo.eager.gating import gated
from dipgo.graph.trace import trace
from dipgo.schedule.subnet import load_subnet, save_subnet
from export.compiler import prepare, write_bundle
from tests import command, zoo
from tests.checks import error
from tests.models import random_subnet

RESCALE = 0.7


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rescale")
    traced = trace(zoo.model("sd-v"), None, GuidanceScale(4.0, RESCALE))
    subnet = random_subnet(traced, zoo.sampler("sd-v", 4), seed=0)
    save_subnet(subnet, folder / "subnet.json")
    assert load_subnet(folder / "subnet.json").sampler.guidance_rescale == RESCALE
    write_bundle(prepare(traced), subnet, zoo.sampler("sd-v", 4), folder / "bundle")
    pipe = zoo.model("sd-v").pipeline()
    pipe.set_progress_bar_config(disable=True)
    return folder / "bundle", subnet, pipe


def images(pipe, **changes):
    arguments = {"guidance_scale": 4.0, "guidance_rescale": RESCALE, "num_inference_steps": 4, "output_type": "np"}
    prompts, generator = ["a red fox", "two dogs"], torch.Generator().manual_seed(3)
    return pipe(prompts, generator=generator, **arguments | changes).images


def test_images_are_those_of_the_gated_pipeline(made):
    bundle, subnet, pipe = made
    with gated(pipe.unet, subnet):
        expected, plain = images(pipe), images(pipe, guidance_rescale=0.0)
    assert error(plain, expected) > 1e-2
    with dipgo.load(bundle) as program:
        program.set_progress_bar_config(disable=True)
        assert error(images(program), expected) <= 1e-4
        with pytest.raises(UsageError, match=r"guidance_rescale = 0, the bundle was compiled for 0.7"):
            images(program, guidance_rescale=0.0)
    with dipgo.attach(pipe, bundle):
        assert error(images(pipe), expected) <= 1e-4
        with pytest.raises(UsageError, match=r"guidance_rescale = 0, the bundle was compiled for 0.7"):
            images(pipe, guidance_rescale=0.0)


def test_it_is_verified_with_it(made):
    bundle, _, _ = made
    result = command.dipgo("verify", bundle)
    assert (result.code, result.out.startswith("parity holds")) == (0, True), result.err


def test_a_rescale_is_given_with_a_scale():
    assert guidance_of(None, 0.0) is None
    assert guidance_of("7.5", 0.5) == 7.5
    with pytest.raises(UsageError, match=r"--guidance-rescale 0.5 is given without --guidance; give both"):
        guidance_of(None, 0.5)
