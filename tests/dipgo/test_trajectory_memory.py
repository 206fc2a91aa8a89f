"""The trajectory: recomputed steps give the same gradient, only what is read later is kept, devices, precision."""

import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree

from dipgo.eager.trajectory import Trajectory
from dipgo.graph.liveness import canonical, plan
from dipgo.graph.outputs import take_apart
from dipgo.schedule.fixed_schedules import extrapolation
from dipgo.schedule.schedule import Schedule
from dipgo.searching.backup_fit import Backups
from dipgo.searching.losses import final_latent, make_loss
from dipgo.searching.pruner import straight_through
from tests import zoo
from tests.checks import refused

STEPS = 6


@pytest.fixture(scope="module", params=["dit", "sd"])
def ground(request):
    task = zoo.task(request.param, STEPS, {"dit": "dpm++2m", "sd": "ddim"}[request.param])
    batch = task.sampling.draw(2, 0)
    return task.trace, task.trajectory, batch.noise, batch.conditions


def random_gates(traced, seed, keep=0.5, calls=STEPS):
    gates = np.random.default_rng(seed).random((calls, len(traced.sites))) < keep
    gates[0] = True
    return gates


def gradients(module, latents, target):
    for parameter in module.parameters():
        parameter.grad = None
    loss = final_latent(latents, target)
    loss.backward()
    return loss.item(), [
        torch.zeros_like(parameter) if parameter.grad is None else parameter.grad for parameter in module.parameters()
    ]


def assert_same(first, second, tolerance=1e-6):
    assert first[0] == pytest.approx(second[0], rel=tolerance)
    scale = max(gradient.abs().max().item() for gradient in first[1])
    assert scale > 0
    for a, b in zip(first[1], second[1], strict=True):
        assert (a - b).abs().max().item() <= tolerance * scale


@pytest.mark.parametrize("history", [1, 2, 3])
def test_recomputed_steps_give_the_gradient_of_backups(ground, history):
    traced, trajectory, noise, conditions = ground
    target = trajectory.full(noise, conditions)
    for seed in range(2):
        gates = random_gates(traced, seed)
        backups = Backups(traced, Schedule(gates), history)
        for parameter in backups.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        plain, again = (
            gradients(backups, way.gated(noise, conditions, gates, backups()), target)
            for way in (trajectory, replace(trajectory, recompute=True))
        )
        assert_same(plain, again)


def test_recomputed_steps_give_the_gradient_of_gates(ground):
    traced, trajectory, noise, conditions = ground
    target = trajectory.full(noise, conditions)
    hard = random_gates(traced, 3)
    kept = torch.from_numpy(hard).float()
    scores = torch.nn.ParameterList([torch.rand(hard.shape, generator=torch.Generator().manual_seed(1))])
    plain, again = (
        gradients(scores, way.supernet(noise, conditions, straight_through(scores[0], kept)), target)
        for way in (trajectory, replace(trajectory, recompute=True))
    )
    assert_same(plain, again)


def test_supernet_equals_the_subnet_of_its_gates(ground):
    """Both branches, mixed by hard gates, are the SubNet that executes only one of them."""
    traced, trajectory, noise, conditions = ground
    gates = random_gates(traced, 5)
    with torch.no_grad():
        mixed = trajectory.supernet(noise, conditions, torch.from_numpy(gates).float())
        gated = trajectory.gated(noise, conditions, gates, {})
    assert torch.allclose(mixed[-1], gated[-1], rtol=1e-4, atol=1e-4)


def test_without_a_trace_the_result_is_the_same(ground):
    traced, trajectory, noise, conditions = ground
    blind = Trajectory(trajectory.guided, trajectory.sites, trajectory.sampler)
    gates = random_gates(traced, 7, keep=0.3)
    with torch.no_grad():
        for backups in ({}, extrapolation(traced, gates).tensors()):
            traced_only = trajectory.gated(noise, conditions, gates, backups)[-1]
            assert torch.equal(traced_only, blind.gated(noise, conditions, gates, backups)[-1])


def tensors():
    gc.collect()
    return [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]


def held_bytes(run, before):
    """Bytes of tensors that are alive because of ``run`` when it returns, saved for the backward pass or otherwise."""
    saved = []
    gc.freeze()  # what was there before is not looked at again
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        result = run()
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in [*tensors(), *saved]}
    gc.unfreeze()
    assert result
    return sum(size for key, size in storages.items() if key not in before)


def test_recomputing_holds_latents_and_live_outputs(ground):
    traced, trajectory, noise, conditions = ground
    gates = canonical(random_gates(traced, 2), 2, traced.live_sites)
    backups = Backups(traced, Schedule(gates))
    weights = backups()
    before = {tensor.untyped_storage()._cdata for tensor in tensors()}
    plain, less = (
        held_bytes(lambda way=way: way.gated(noise, conditions, gates, weights), before)
        for way in (trajectory, replace(trajectory, recompute=True))
    )
    outputs = sum(
        4 * np.prod(traced.shape(name, len(noise)))
        for entry in plan(gates, 2, traced.live_sites)
        for site in entry.stored
        for name in traced.outputs[site]
    )
    assert less <= plain / 4
    assert outputs <= less <= outputs + 5 * (STEPS + 1) * noise.nbytes + 2 * noise.nbytes


def test_only_live_outputs_outlive_their_step(ground, monkeypatch):
    """While a step runs without gradient, the outputs alive are those that it or a later step reads."""
    traced, trajectory, noise, conditions = ground
    gates = random_gates(traced, 4)
    weights = extrapolation(traced, gates).tensors()
    plans = plan(gates, 2, traced.live_sites)
    last = {}
    for step, entry in enumerate(plans):
        last |= {(source, site): step for site, past in entry.served.items() for source in past}
    made, counts = {}, []
    original = Trajectory.call

    def call(self, latent, timestep, conditions):
        step = len(counts)
        counts.append(
            {key for key, references in made.items() if any(reference() is not None for reference in references)}
        )

        def remember(site):
            def hook(module, args, output):
                made[step, site] = [weakref.ref(tensor) for tensor in take_apart(output)[0]]

            return hook

        modules = [self.guided.denoiser.get_submodule(name) for name in self.names]
        handles = [module.register_forward_hook(remember(site)) for site, module in enumerate(modules)]
        try:
            return original(self, latent, timestep, conditions)
        finally:
            for handle in handles:
                handle.remove()

    monkeypatch.setattr(Trajectory, "call", call)
    with torch.no_grad():
        trajectory.gated(noise, conditions, gates, weights)
    assert [found for found in counts if found]
    for now, found in enumerate(counts):
        assert found <= {key for key, step in last.items() if key[0] < now <= step}


def test_a_site_whose_output_changes_shape_is_refused(ground, monkeypatch):
    traced, trajectory, noise, conditions = ground
    name = trajectory.names[0]
    module = trajectory.guided.denoiser.get_submodule(name)
    original = type(module).forward
    calls = []

    def forward(self, *args, **kwargs):
        output = original(self, *args, **kwargs)
        calls.append(self is module)
        return output if sum(calls) < 3 else pytree.tree_map(lambda tensor: tensor[..., :-1], output)

    monkeypatch.setattr(type(module), "forward", forward)
    gates = np.ones((STEPS, len(traced.sites)), bool)
    with refused(rf"site '{name}' hands on \[.* at step 0 but \[.* at step 2"):
        trajectory.gated(noise, conditions, gates, {})


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_and_gives_finite_float32_gradient(ground, precision):
    traced, trajectory, noise, conditions = ground
    half = replace(trajectory, precision=precision)
    gates = random_gates(traced, 2)
    backups = Backups(traced, Schedule(gates))
    with torch.no_grad():
        exact = trajectory.gated(noise, conditions, gates, backups())[-1]
    latents = half.gated(noise, conditions, gates, backups())
    assert latents[-1].dtype == torch.float32
    distance = (latents[-1] - exact).norm() / exact.norm()
    assert 0 < distance < (0.1 if precision == torch.bfloat16 else 0.02), "in half precision, and no further away"
    target = trajectory.full(noise, conditions)
    plain = gradients(backups, latents, target)
    again = gradients(backups, replace(half, recompute=True).gated(noise, conditions, gates, backups()), target)
    assert_same(plain, again, 1e-5)
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in plain[1])


def test_everything_is_on_the_device_of_the_denoiser():
    """On the meta device any tensor left on the CPU is an error."""
    task = zoo.task("dit", 3, device="meta")
    traced, trajectory = task.trace, task.trajectory
    batch = task.sampling.draw(2, 0)
    assert batch.noise.device.type == "meta"
    target = trajectory.full(batch.noise, batch.conditions)
    gates = random_gates(traced, 0, calls=3)
    backups = Backups(traced, Schedule(gates)).to("meta")
    keep = torch.from_numpy(gates).float()
    for way in (trajectory, replace(trajectory, recompute=True)):
        latents = way.gated(batch.noise, batch.conditions, gates, backups())
        loss = make_loss("ssim+latent", task.decode)(latents, target)
        loss.backward()
        assert loss.device.type == "meta"
        assert way.supernet(batch.noise, batch.conditions, keep)[-1].device.type == "meta"
