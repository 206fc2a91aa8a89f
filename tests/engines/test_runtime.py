"""The runtime alone: torch's noise without torch, no torch or diffusers imported, no state between calls."""

import numpy as np
import pytest
import torch

import dipgo
from engines.pipeline.images import grid
from engines.pipeline.noise import Stream
from tests import zoo
from tests.checks import misused, python
from tests.engines.dropin import compiled
from tests.models import random_subnet


@pytest.fixture(scope="module")
def bundle():
    traced, sampler = zoo.trace("dit"), zoo.sampler("dit", 5)
    return zoo.bundle(traced, sampler, random_subnet(traced, sampler, seed=0, terms=2, channels=2))


@pytest.mark.parametrize("shape", [(16,), (1, 4, 8, 8), (3, 5, 7), (2, 4, 64, 64)])
@pytest.mark.parametrize("seed", [0, 2**32 - 1, 2**32 + 7, 2**64 - 1, -1, -(2**63)])
def test_noise_is_torch_s(shape, seed):
    generator, stream = torch.Generator().manual_seed(seed), Stream(seed)
    for size in (shape, (3, 7), shape):  # each draw goes on where the one before ended
        expected = torch.randn(size, generator=generator).numpy()
        assert np.abs(stream.randn(size) - expected).max() <= 1e-6


def test_noise_that_torch_draws_otherwise_is_refused():
    with pytest.raises(ValueError, match="fewer than the 16"):
        Stream(0).randn((3, 5))
    with pytest.raises(ValueError, match="outside"):
        Stream(2**64)


LIGHT = "torch diffusers transformers onnx onnx_ir"


def test_runs_without_torch_and_diffusers(bundle):
    """A real process in which importing torch, diffusers or transformers fails."""
    code = "import dipgo\nwith dipgo.load(sys.argv[1]) as program: print(float(program.generate([0, 1], 3).sum()))"
    done = python(code, bundle, without=LIGHT)
    with dipgo.load(bundle) as program:
        assert float(done.stdout) == pytest.approx(float(program.generate([0, 1], 3).sum()), rel=1e-5)


IN_BFLOAT16 = """
from dataclasses import replace
from pathlib import Path
import numpy as np
from engines.guidance import Guidance
from engines.pipeline.conditions import conditions_of
from engines.program import Program
from export.bundle import open_bundle

bundle = open_bundle(Path(sys.argv[1]))
conditioning = bundle.record.conditioning
inputs = [tensor.model_copy(update={"dtype": "bfloat16"}) for tensor in conditioning.inputs]
conditioning = conditioning.model_copy(update={"inputs": inputs})
bundle = replace(bundle, record=bundle.record.model_copy(update={"conditioning": conditioning}))
outputs = bundle.record.conditioning.encoder.outputs

class Runner:
    def run(self, file, inputs):
        return {output.name: np.ones(output.shape, np.float32) for output in outputs}

program, ones = Program(bundle, Runner()), np.ones((1, 77, 24), np.float32)
assert "ml_dtypes" not in sys.modules
if sys.argv[2] == "prompt":
    found = program.conditions(["a"])
else:
    embeddings = {"prompt_embeds": ones, "negative_prompt_embeds": ones}
    found = conditions_of(program, None, (1, 1), (16, 16), embeddings, Guidance())[1]
print(found["encoder_hidden_states"].dtype, found["encoder_hidden_states"].astype(float).sum())
"""


def test_conditions_in_bfloat16_come_without_torch():
    """Of prompts and of embeddings; numpy knows the type from ml_dtypes alone, which nobody else has imported here."""
    folder = compiled("sd").folder
    for kind in ("prompt", "embeddings"):
        done = python(IN_BFLOAT16, folder, kind, without=LIGHT)
        assert done.stdout.split() == ["bfloat16", str(2.0 * 77 * 24)]


def test_wrong_requests_are_refused(bundle):
    with dipgo.load(bundle) as program:
        assert program.class_of("dog") == program.class_of("1") == 1
        with misused(r"class 'wolf' is unknown to .*; it has: cat, dog, fox"):
            program.class_of("wolf")
        with misused(r"seed 18446744073709551616 is outside .*; give another seed"):
            program.generate([0], 2**64)
        with misused("class 7 is unknown"):
            program.conditions([7])
        with misused(r"noise is \[2, 4, 8, 8\], the bundle was compiled for \[1, 4, 8, 8\]"):
            program.denoise(program.noise(2, 0), program.conditions([0]))


def test_grid_places_pictures_in_reading_order():
    pixels = np.stack([np.full((2, 3, 1), value / 4, np.float32) for value in range(5)])
    picture = np.array(grid(pixels))
    assert picture.shape == (4, 9)
    assert picture[0, ::3].tolist() == [0, 64, 128]
    assert picture[2, ::3].tolist() == [191, 255, 0]
