"""How much memory a search takes, from shapes alone: no weights are read and nothing is computed.

One step of the SuperNet is run on fake tensors, with its real kernels chosen as on the CPU, and what autograd saves in
it is added up. With recomputation that is held for one step at a time; between steps only latents, what the solver
combines, and the cached outputs that a later step reads are held (:mod:`dipgo.eager.trajectory`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from dipgo.base.records import read_json
from dipgo.eager.gating import intercepting
from dipgo.graph.liveness import plan
from dipgo.graph.outputs import take_apart
from dipgo.graph.trace import Trace
from dipgo.model.families import GuidedDenoiser
from dipgo.model.models import Model
from dipgo.searching.loss_terms import loss_terms

FLOAT = 4  # bytes


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes held at the peak of an iteration, in each process.

    Attributes:
        weights: of the denoiser, and of the VAE where the loss decodes; float32.
        latents: on the way, the solver's basis, and the gradient of both.
        caches: outputs that later steps read, and the gradient of one step's.
        activations: saved for the backward pass: of one step, or of all without recomputation; or of the decoder, if
            that is more. Half precision counts its copies of the weights.
        working: gradients and results under way in one step.
        learned: what is learned, its gradient and the state of the optimiser.
        pool: latents of full trajectories that are kept to be used again.
    """

    weights: int
    latents: int
    caches: int
    activations: int
    working: int
    learned: int
    pool: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Iteration:
    """What an iteration computes and holds.

    Attributes:
        batch: images.
        gates: bool ``[calls, sites]``, for learned backups (activations are counted as if each step computed
            everything); None estimates the SuperNet, where every site is cached at every step.
        history: K of the backups.
        precision: of autocast; None is float32. CUDA keeps normalisations in float32 under autocast where the CPU
            does not, so there the float32 estimate is the upper bound.
        recompute: keep no activations between steps.
        loss: its terms.
        learned: number of learned parameters.
        adam: whether Adam learns them, else SGD.
        pool: images whose full trajectories are kept.
    """

    batch: int = 1
    gates: np.ndarray | None = None
    history: int = 1
    precision: torch.dtype | None = None
    recompute: bool = True
    loss: str = "latent"
    learned: int = 0
    adam: bool = False
    pool: int = 0


def memory_estimate(trace: Trace, calls: int, iteration: Iteration) -> MemoryEstimate:
    """Estimate the memory of an iteration; the latent has the size in the traced model's configuration.

    The text encoder, the allocator's own losses and the buffers of libraries are not counted.
    """
    model = trace.model
    shape = model.latent_shape(iteration.batch)
    latent = FLOAT * int(np.prod(shape))
    step = _step(trace, iteration)
    if iteration.gates is None:
        caches = calls * sum(step.outputs)
    else:
        plans = plan(iteration.gates, iteration.history, trace.live_sites)
        caches = sum(step.outputs[site] for entry in plans for site in entry.stored) + sum(step.outputs)
    decodes = any(name != "latent" for _, name in loss_terms(iteration.loss))
    decoder = _decoder(model, shape) if decodes else _Saved(0, 0, 0)
    steps_held = 1 if iteration.recompute else calls - 1
    return MemoryEstimate(
        weights=step.parameters + decoder.parameters,
        latents=4 * (calls + 1) * latent,
        caches=caches,
        activations=max(step.saved * steps_held, decoder.saved),
        working=4 * max(step.largest, decoder.largest),
        learned=FLOAT * iteration.learned * (4 if iteration.adam else 2),
        pool=iteration.pool * (calls + 1) * latent // iteration.batch,
    )


@dataclass(frozen=True)
class _Saved:
    """Bytes: all that autograd saved, the largest tensor in it, the parameters; and the outputs of each site."""

    saved: int
    largest: int
    parameters: int
    outputs: tuple[int, ...] = ()


def _step(trace: Trace, iteration: Iteration) -> _Saved:
    """Run one step of the SuperNet on fake tensors."""
    model, batch, precision = trace.model, iteration.batch, iteration.precision
    names = [site.name for site in trace.sites]
    outputs = [0] * len(names)
    caches: list[torch.Tensor] = []  # counted apart
    with FakeTensorMode():
        denoiser = _empty(model.family.denoiser_class, model.config)
        guided = GuidedDenoiser(denoiser, model.family, trace.guidance_scale)
        latent = torch.empty(model.latent_shape(batch), requires_grad=True)
        conditions = model.family.example(model.config, batch * min(trace.rows, 2))
        gate = torch.ones((), requires_grad=True)

        def intercept(site: int, compute: Callable[[], object]) -> object:
            tensors, rebuild = take_apart(compute())
            caches.extend(torch.empty_like(tensor) for tensor in tensors)
            mixed = [gate * new + (1 - gate) * old for new, old in zip(tensors, caches[-len(tensors) :], strict=True)]
            outputs[site] = sum(tensor.nbytes for tensor in mixed)
            return rebuild(mixed)

        autocast = torch.autocast("cpu", dtype=precision) if precision else nullcontext()

        def forward() -> torch.Tensor:
            with autocast, intercepting(denoiser, names, intercept):
                return guided(latent, torch.ones(batch), conditions)

        saved, largest = _saved_bytes(forward, denoiser, caches)
    return _Saved(saved, largest, _bytes_of(denoiser), tuple(outputs))


def _decoder(model: Model, shape: tuple[int, ...]) -> _Saved:
    """Decode on fake tensors."""
    config = read_json(model.folder / "vae" / "config.json", "VAE configuration")
    with FakeTensorMode():
        vae = _empty(config["_class_name"], config)
        latent = torch.empty(shape, requires_grad=True)
        saved, largest = _saved_bytes(lambda: vae.decode(latent, return_dict=False)[0], vae)
    return _Saved(saved, largest, _bytes_of(vae))


def _empty(class_name: str, config: dict[str, Any]) -> Any:
    import diffusers

    module: torch.nn.Module = getattr(diffusers, class_name).from_config(config)
    return module.eval().requires_grad_(False)


def _saved_bytes(
    forward: Callable[[], torch.Tensor], module: torch.nn.Module, aside: Sequence[torch.Tensor] = ()
) -> tuple[int, int]:
    """Return the bytes that autograd saves in a call, parameters and ``aside`` left out, and the largest tensor's."""
    saved: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    own = {tensor.untyped_storage()._cdata for tensor in [*module.parameters(), *module.buffers(), *aside]}
    sizes = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in saved}
    del result
    sizes = {key: size for key, size in sizes.items() if key not in own}
    return sum(sizes.values()), max(sizes.values())


def _bytes_of(module: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()])
