"""The SubNets that the tables are made of, checked as somebody else would: plain hooks on the diffusers pipeline."""

import json
from functools import cache
from pathlib import Path

import diffusers
import pytest
import torch
from torch.utils import _pytree as pytree

from benchmarks.bench.quality import image_psnr
from dipgo.model.models import find_model
from dipgo.schedule.subnet import load_subnet
from tests import zoo

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
IMAGES, SEED = 16, 987_654  # no search and no table draws from this seed
GIVEN = {
    "digits-dit": [number % 10 for number in range(IMAGES)],
    "digits-flux": (BENCHMARKS / "names" / "digits-flux-judge.txt").read_text().splitlines()[: 5 * IMAGES : 5],
    "emoji-sd": (BENCHMARKS / "names" / "emoji-sd-judge.txt").read_text().splitlines()[: 50 * IMAGES : 50],
}
OWN = {"digits-flux": {"height": 32, "width": 32, "max_sequence_length": 16}}


@cache
def pipe_of(model):
    pipe = find_model(model).pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(model, sampler):
    pipe = pipe_of(model)
    pipe.scheduler = getattr(diffusers, sampler.class_name).from_config(sampler.config)
    options = {"guidance_scale": sampler.guidance_scale, "num_inference_steps": sampler.steps, "output_type": "np"}
    options |= OWN.get(model, {})
    return pipe(GIVEN[model], generator=torch.Generator().manual_seed(SEED), **options).images


def generate_gated(model, subnet):
    """Compute everything, and hand on in the place of a skipped site's output what its backup makes of earlier ones."""
    pipe = pipe_of(model)
    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    handles = []
    for index, site in enumerate(subnet.sites):
        backups = subnet.schedule.backups
        weights = [array for name, array in backups.items() if name.partition("#")[0] == f"backup.{site.name}"]
        if model == "digits-dit":  # DiTPipeline has the conditional half first
            weights = [array[:, :, ::-1].copy() if array.ndim == 4 else array for array in weights]
        hook = serve(subnet.gates[:, index], weights, site.channel_axis)
        handles.append(denoiser.get_submodule(site.name).register_forward_hook(hook))
    try:
        return generate(model, subnet.sampler)
    finally:
        for handle in handles:
            handle.remove()


def serve(gates, weights, axis):
    """A hook; ``weights`` are in order of the output's tensors, one that stands there twice counted once."""
    past, steps = [], iter(range(len(gates)))

    def hook(module, inputs, output):
        step = next(steps)
        tensors, tree = pytree.tree_flatten(output)
        if gates[step]:
            past.insert(0, tensors)
            return output
        if not weights:
            return pytree.tree_unflatten(past[0], tree)
        order = list(dict.fromkeys(id(tensor) for tensor in past[0]))
        served = []
        for k, tensor in enumerate(past[0]):
            channels = [1] * tensor.ndim
            channels[axis] = -1
            total = 0
            for old, weight in zip(past, torch.from_numpy(weights[order.index(id(tensor))][step]), strict=False):
                halves = old[k].chunk(len(weight)) if weight.ndim == 2 else [old[k]]
                shares = list(weight) if weight.ndim == 2 else [weight]
                total += torch.cat([half * share.view(channels) for half, share in zip(halves, shares, strict=True)])
            served.append(total)
        return pytree.tree_unflatten(served, tree)

    return hook


DIFFUSION = [
    (model, folder) for model in ("digits-dit", "emoji-sd") for folder in ("ddim", "ddim-paper", "dpm", "dpm-paper")
]
SEARCHES = [*DIFFUSION, ("digits-flux", "flow")]
TOLERANCE = {"digits-dit": 2.5, "digits-flux": 2.5, "emoji-sd": 4}  # dB, of 16 images


@pytest.mark.parametrize(("model", "folder"), zoo.some(SEARCHES, SEARCHES[:1]))
def test_on_new_noise_they_keep_what_the_table_says(model, folder):
    table, row = (
        f"search-{model}-{folder.partition('-')[0]}",
        "the paper's method" if "paper" in folder else "**dipgo**",
    )
    record = json.loads((BENCHMARKS / "results" / f"{table}.json").read_text())
    claimed = {cell["budget"]: cell for cell in record["cells"] if cell["row"] == row}
    subnets = {budget: load_subnet(BENCHMARKS / "subnets" / model / folder / f"{budget}.json") for budget in claimed}
    full = generate(model, subnets[0.5].sampler)
    for budget, subnet in subnets.items():
        assert subnet.cost.ratio == pytest.approx(claimed[budget]["macs_ratio"], abs=1e-4)
        assert subnet.cost.ratio <= budget
        found = image_psnr(generate_gated(model, subnet), full).mean()
        assert found == pytest.approx(claimed[budget]["image_psnr_db"], abs=TOLERANCE[model])
