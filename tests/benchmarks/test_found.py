"""The SubNets that the tables are made of, checked as somebody else would: plain hooks on the diffusers pipeline."""

import json
from pathlib import Path

import diffusers
import pytest
import torch

from benchmarks.quality import image_psnr
from dipgo.models import find_model
from dipgo.subnet import load_subnet

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
IMAGES, SEED = 16, 987_654  # no search and no table draws from this seed


@pytest.fixture(scope="module")
def pipe():
    return find_model("digits-dit").pipeline()


def generate(pipe, sampler):
    pipe.scheduler = getattr(diffusers, sampler.class_name).from_config(sampler.config)
    pipe.set_progress_bar_config(disable=True)
    classes = [number % 10 for number in range(IMAGES)]
    options = {"guidance_scale": sampler.guidance_scale, "num_inference_steps": sampler.steps, "output_type": "np"}
    return pipe(classes, generator=torch.Generator().manual_seed(SEED), **options).images


def generate_gated(pipe, subnet):
    """Compute everything, and hand on in the place of a skipped site's output what its backup makes of earlier ones."""
    handles = []
    for index, site in enumerate(subnet.sites):
        weights = subnet.weights.get(f"backup.{site.name}")
        handles.append(
            pipe.transformer.get_submodule(site.name).register_forward_hook(serve(subnet.gates[:, index], weights))
        )
    try:
        return generate(pipe, subnet.sampler)
    finally:
        for handle in handles:
            handle.remove()


def serve(gates, weights):
    past, steps = [], iter(range(len(gates)))

    def hook(module, inputs, output):
        step = next(steps)
        if gates[step]:
            past.insert(0, output)
            return output
        if weights is None:
            return past[0]
        return sum(old * torch.from_numpy(weight) for old, weight in zip(past, weights[step], strict=False))

    return hook


@pytest.mark.parametrize(
    ("folder", "table", "row"),
    [
        ("ddim", "search-digits-dit-ddim", "**dipgo**"),
        ("ddim-paper", "search-digits-dit-ddim", "the paper's method"),
        ("dpm", "search-digits-dit-dpm", "**dipgo**"),
        ("dpm-paper", "search-digits-dit-dpm", "the paper's method"),
    ],
)
def test_on_new_noise_they_keep_what_the_table_says(pipe, folder, table, row):
    record = json.loads((BENCHMARKS / "results" / f"{table}.json").read_text())
    claimed = {cell["budget"]: cell for cell in record["cells"] if cell["row"] == row}
    subnets = {
        budget: load_subnet(BENCHMARKS / "subnets" / "digits-dit" / folder / f"{budget}.json") for budget in claimed
    }
    full = generate(pipe, subnets[0.5].sampler)
    for budget, subnet in subnets.items():
        assert subnet.cost.ratio == pytest.approx(claimed[budget]["macs_ratio"], abs=1e-4)
        assert subnet.cost.ratio <= budget
        found = image_psnr(generate_gated(pipe, subnet), full).mean()
        assert found == pytest.approx(claimed[budget]["image_psnr_db"], abs=2.5)  # of 16 images, not 256
