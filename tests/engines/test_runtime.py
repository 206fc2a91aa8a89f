"""The runtime alone: torch's noise without torch, no torch or diffusers imported, no state between calls."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import dipgo
from dipgo.base.errors import UsageError
from engines.pipeline.images import grid
from engines.pipeline.noise import torch_randn
from tests import zoo
from tests.models import random_subnet


@pytest.fixture(scope="module")
def bundle():
    traced, sampler = zoo.trace("dit"), zoo.sampler("dit", 5)
    return zoo.bundle(traced, sampler, random_subnet(traced, sampler, seed=0, terms=2, channels=2))


@pytest.mark.parametrize("shape", [(16,), (1, 4, 8, 8), (3, 5, 7), (2, 4, 64, 64)])
@pytest.mark.parametrize("seed", [0, 2**32 - 1, 2**32 + 7, 2**64 - 1, -1, -(2**63)])
def test_noise_is_torch_s(shape, seed):
    expected = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).numpy()
    assert np.abs(torch_randn(shape, seed) - expected).max() <= 1e-6


def test_noise_that_torch_draws_otherwise_is_refused():
    with pytest.raises(ValueError, match="fewer than the 16"):
        torch_randn((3, 5), 0)
    with pytest.raises(ValueError, match="outside"):
        torch_randn((16,), 2**64)


def test_runs_without_torch_and_diffusers(bundle):
    """A real process in which importing torch, diffusers or transformers fails."""
    script = f"""
import sys
for name in ("torch", "diffusers", "transformers", "onnx", "onnx_ir"):
    sys.modules[name] = None
import dipgo
with dipgo.load({str(bundle)!r}) as program:
    print(float(program.generate([0, 1], 3).sum()))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    with dipgo.load(bundle) as program:
        assert float(result.stdout) == pytest.approx(float(program.generate([0, 1], 3).sum()), rel=1e-5)


def test_conditions_in_bfloat16_come_without_torch():
    """Of prompts and of embeddings; numpy knows the type from ml_dtypes alone, which nobody else has imported here."""
    traced, sampler = zoo.trace("sd", dtype=torch.bfloat16), zoo.sampler("sd", 2)
    folder = zoo.bundle(traced, sampler, random_subnet(traced, sampler, 0))
    script = f"""
import sys
for name in ("torch", "diffusers", "transformers", "onnx", "onnx_ir"):
    sys.modules[name] = None
from pathlib import Path
import numpy as np
from engines.pipeline.conditions import conditions_of
from engines.program import Program
from export.bundle import open_bundle
bundle = open_bundle(Path({str(folder)!r}))

outputs = bundle.record.conditioning.encoder.outputs

class Runner:
    def run(self, file, inputs):
        return {{output.name: np.ones(output.shape, np.float32) for output in outputs}}

program, half = Program(bundle, Runner()), np.ones((1, 77, 24), np.float32)
embeddings = {{"prompt_embeds": half, "negative_prompt_embeds": half}}
assert "ml_dtypes" not in sys.modules
if sys.argv[1] == "prompt":
    found = program.conditions(["a"])
else:
    found = conditions_of(program, None, 1, 1, (16, 16), embeddings)[1]
print(found["encoder_hidden_states"].dtype, found["encoder_hidden_states"].astype(float).sum())
"""
    for made in ("prompt", "embeddings"):
        done = subprocess.run([sys.executable, "-c", script, made], capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["bfloat16", str(2.0 * 77 * 24)]


def test_calls_do_not_leak_into_each_other(bundle):
    with dipgo.load(bundle) as program:
        first = program.generate([0], 1)

        def stop(step, epsilon):
            if step == 2:
                raise RuntimeError("cancelled")

        with pytest.raises(RuntimeError, match="cancelled"):
            program.denoise(program.noise(1, 2), program.conditions([1]), after_step=stop)
        assert np.array_equal(program.generate([0], 1), first)

        with ThreadPoolExecutor() as pool:
            results = dict(zip((1, 2), pool.map(lambda seed: program.generate([0, 1], seed), (1, 2)), strict=True))
        for seed in (1, 2):
            assert np.array_equal(results[seed], program.generate([0, 1], seed))


def test_wrong_requests_are_refused(bundle):
    with dipgo.load(bundle) as program:
        assert program.class_of("dog") == program.class_of("1") == 1
        with pytest.raises(UsageError, match=r"class 'wolf' is unknown to .*; it has: cat, dog, fox"):
            program.class_of("wolf")
        with pytest.raises(UsageError, match=r"seed 18446744073709551616 is outside .*; give another seed"):
            program.generate([0], 2**64)
        with pytest.raises(UsageError, match="class 7 is unknown"):
            program.conditions([7])
        with pytest.raises(UsageError, match=r"noise is \[2, 4, 8, 8\], the bundle was compiled for \[1, 4, 8, 8\]"):
            program.denoise(program.noise(2, 0), program.conditions([0]))


def test_grid_places_pictures_in_reading_order():
    pixels = np.stack([np.full((2, 3, 1), value / 4, np.float32) for value in range(5)])
    picture = np.array(grid(pixels))
    assert picture.shape == (4, 9)
    assert picture[0, ::3].tolist() == [0, 64, 128]
    assert picture[2, ::3].tolist() == [191, 255, 0]
