"""Gated execution of the real diffusers pipeline."""

import warnings

import numpy as np
import pytest
import torch

from dipgo.base.errors import DipgoWarning
from dipgo.eager.gating import combine, gated
from dipgo.schedule.schedule import Schedule
from tests import zoo
from tests.models import random_subnet

STEPS = 6


@pytest.fixture(scope="module")
def task():
    return zoo.task("dit", STEPS, sites="transformer_blocks.*.attn1,transformer_blocks.*.ff")


def images(task, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return task.pipe([0, 1], num_inference_steps=STEPS, generator=generator, output_type="np").images


def test_gates_act_while_they_are_set_and_not_where_all_are_one(task):
    before = images(task)
    some, everything = (random_subnet(task.trace, task.sampler, seed=0, keep=keep) for keep in (0.5, 1.0))
    with gated(task.pipe.transformer, some):
        assert not np.allclose(before, images(task))
    assert np.array_equal(before, images(task))
    with gated(task.pipe.transformer, everything):
        assert np.array_equal(before, images(task))


def test_trajectories_in_one_context_do_not_leak_into_each_other(task):
    subnet = random_subnet(task.trace, task.sampler, seed=1, terms=2, channels=1)
    with gated(task.pipe.transformer, subnet):
        first = images(task, seed=1)
        images(task, seed=2)
        again = images(task, seed=1)
    assert np.array_equal(first, again)


def test_other_steps_than_the_subnet_s_are_said(task):
    subnet = random_subnet(task.trace, task.sampler, seed=1)
    with gated(task.pipe.transformer, subnet), warnings.catch_warnings():
        warnings.simplefilter("error")
        images(task)
    with pytest.warns(DipgoWarning, match="ended at call 2 of 6"), gated(task.pipe.transformer, subnet):
        task.pipe([0, 1], num_inference_steps=STEPS + 2)


def test_skipped_modules_do_not_run(task):
    subnet = random_subnet(task.trace, task.sampler, seed=2)
    ran, handles = [], []
    for site in subnet.sites:
        inner = task.pipe.transformer.get_submodule(f"{site.name}.{'to_q' if 'attn' in site.name else 'net.0'}")
        handles.append(inner.register_forward_hook(lambda *_, name=site.name: ran.append(name)))
    with gated(task.pipe.transformer, subnet):
        images(task)
    for handle in handles:
        handle.remove()
    assert [ran.count(site.name) for site in subnet.sites] == subnet.gates.sum(axis=0).tolist()


@pytest.mark.parametrize(("axis", "shape"), [(1, (6, 4, 2, 2)), (2, (6, 3, 4))])
def test_each_half_of_guidance_is_combined_with_its_own_weights(axis, shape):
    generator = torch.Generator().manual_seed(0)
    history = [torch.randn(shape, generator=generator) for _ in range(2)]
    weights = torch.randn((2, 2, 4), generator=generator)
    found = combine(history, weights, axis)
    for half, rows in enumerate((slice(0, 3), slice(3, 6))):
        parts = zip(history, weights[:, half].numpy(), strict=True)
        expected = sum(
            np.moveaxis(np.moveaxis(past[rows].numpy(), axis, -1) * factor, -1, axis) for past, factor in parts
        )
        assert np.allclose(found[rows], expected, atol=1e-6)


@pytest.mark.parametrize("channels", [None, 0, 1, 2])
def test_differentiable_trajectory_equals_the_gated_pipeline(task, channels):
    terms = 1 if channels is None else 2
    subnet = random_subnet(task.trace, task.sampler, seed=3, terms=terms, channels=channels)
    noise = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(5))
    halves = task.model.family.conditions(task.pipe, [0, 1])
    conditions = {"class_labels": torch.cat([halves[0]["class_labels"], halves[1]["class_labels"]])}
    latents = task.trajectory.gated(noise, conditions, subnet.gates, subnet.schedule.tensors())[-1]
    with gated(task.pipe.transformer, subnet):
        expected = images(task, seed=5)
    decoded = (task.decode(latents) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert np.linalg.norm(decoded - expected) <= 1e-5 * np.linalg.norm(expected)


def test_gradient_reaches_gates_and_backups(task):
    subnet = random_subnet(task.trace, task.sampler, seed=5, terms=2, channels=2)
    batch = task.sampling.draw(2, 1)
    weights = {name: tensor.requires_grad_() for name, tensor in subnet.schedule.tensors().items()}
    task.trajectory.gated(batch.noise, batch.conditions, subnet.gates, weights)[-1].square().mean().backward()
    for index, site in enumerate(subnet.sites):
        gradient = weights[f"backup.{site.name}"].grad.abs().sum(dim=(1, 3))
        assert ((gradient > 0).numpy() == ~subnet.gates[:, index, None]).all(), "either half of guidance"
    gates = torch.from_numpy(subnet.gates.astype(np.float32)).requires_grad_()
    task.trajectory.supernet(batch.noise, batch.conditions, gates)[-1].square().mean().backward()
    assert (gates.grad[1:] != 0).all()
    assert Schedule(subnet.gates).share(task.trace.macs) < 1
