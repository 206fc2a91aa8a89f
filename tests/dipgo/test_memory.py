"""The memory estimate, from fake tensors, against what real runs save."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from dipgo.model.sampler import tabulate
from dipgo.searching.memory import Iteration, memory_estimate
from tests import zoo

BATCH = 3


@pytest.fixture(scope="module", params=["dit", "sd"])
def ground(request):
    task = zoo.task(request.param, 2, "ddim")
    batch = task.sampling.draw(BATCH, 0)
    return task.trace, task.trajectory, batch.noise, batch.conditions


def saved_bytes(trajectory, noise, conditions, calls):
    """What a real SuperNet saves for its backward pass; the first step has no gradient."""
    trajectory = replace(trajectory, sampler=tabulate(DDIMScheduler(clip_sample=False), calls))
    gates = torch.ones(calls, len(trajectory.sites), requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        trajectory.supernet(noise, conditions, gates)
    own = {tensor.untyped_storage()._cdata for tensor in trajectory.guided.state_dict().values()}
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in kept}
    return sum(size for key, size in storages.items() if key not in own)


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_activations_are_what_autograd_saves(ground, precision):
    traced, trajectory, noise, conditions = ground
    way = replace(trajectory, precision=precision)
    measured = saved_bytes(way, noise, conditions, 4) - saved_bytes(way, noise, conditions, 3)
    estimate = memory_estimate(traced, 4, Iteration(BATCH, precision=precision))
    cached = estimate.caches / 4  # saved too, some of it as an activation anyway; counted apart
    assert 0.98 * estimate.activations <= measured <= 1.02 * (estimate.activations + cached)


def test_parts_of_the_estimate(ground):
    traced, trajectory, noise, _ = ground
    outputs = [sum(4 * np.prod(traced.shape(name, BATCH)) for name in names) for names in traced.outputs]
    supernet = memory_estimate(traced, 5, Iteration(BATCH, learned=1000))
    parameters = sum(parameter.nbytes for parameter in trajectory.guided.parameters())
    assert parameters <= supernet.weights <= parameters + sum(buffer.nbytes for buffer in trajectory.guided.buffers())
    assert supernet.caches == 5 * sum(outputs)
    assert supernet.learned == 8000
    assert supernet.latents == 4 * 6 * noise.nbytes
    gates = np.ones((5, len(traced.sites)), bool)
    gates[3, 1] = False
    few = memory_estimate(traced, 5, Iteration(BATCH, gates, history=2, adam=True, learned=1000, pool=30))
    assert few.caches == 2 * outputs[1] + sum(outputs), "two outputs of one site are read later"
    assert few.learned == 16000
    assert few.pool == 10 * 6 * noise.nbytes
    kept = memory_estimate(traced, 5, Iteration(BATCH, recompute=False))
    assert kept.activations == 4 * supernet.activations
    assert supernet.total < kept.total


def test_a_loss_on_images_counts_the_decoder():
    traced = zoo.trace("dit")
    latent, images = (memory_estimate(traced, 5, Iteration(BATCH, loss=loss)) for loss in ("latent", "0.5*ssim+latent"))
    assert images.weights > latent.weights
    assert images.activations >= latent.activations
