"""Gated execution: run a denoiser with some of its sites skipped, without touching its code.

One primitive, :func:`intercepting`, replaces the ``forward`` of each site while a context lasts. :func:`gated` uses
it to run a whole diffusers pipeline under a SubNet; the search uses it for one differentiable step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dipgo.graph.outputs import Rebuild, take_apart
from dipgo.model.families import FAMILIES
from dipgo.schedule.schedule import backup_name
from dipgo.schedule.subnet import SubNet

Intercept = Callable[[int, Callable[[], Any]], Any]


@contextmanager
def intercepting(denoiser: nn.Module, names: Sequence[str], intercept: Intercept) -> Iterator[None]:
    """Within the context, calling site i returns ``intercept(i, compute)``; ``compute()`` runs the module itself."""
    modules = [denoiser.get_submodule(name) for name in names]

    def replace(index: int, module: nn.Module) -> None:
        original = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            return intercept(index, lambda: original(*args, **kwargs))

        module.forward = forward

    for index, module in enumerate(modules):
        replace(index, module)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def combine(history: Sequence[torch.Tensor], weights: torch.Tensor, channel_axis: int) -> torch.Tensor:
    """Return Σ_j weights[j] · history[j], newest first.

    ``weights`` is ``[K]``, ``[K, channels]`` or ``[K, 2, channels]``: the channels along ``channel_axis`` of the
    outputs, the two passes of guidance along their batch, the unconditional first. A history shorter than K stands for
    zeros.
    """
    total: torch.Tensor | None = None
    for output, weight in zip(history, weights, strict=False):
        shape = [1] * output.ndim
        if weight.ndim:
            shape[channel_axis] = weight.shape[-1]
        factor = weight.to(output.device, output.dtype)
        if weight.ndim == 2:
            passes = output.unflatten(0, (len(weight), -1)) * factor.view(len(weight), *shape)
            term = passes.flatten(0, 1)
        else:
            term = output * factor.view(shape)
        total = term if total is None else total + term
    assert total is not None, "a site was skipped before it was ever computed"
    return total


@contextmanager
def gated(denoiser: nn.Module, subnet: SubNet) -> Iterator[None]:
    """Run ``denoiser`` under ``subnet``: the k-th call within the context is step k of the trajectory.

    The passes of guidance lie in the batch as the class's own pipeline has them. Skipped sites are not executed; they
    serve their backup. After the last step the count starts again, with empty caches, so one context may hold
    several trajectories.
    """
    names = [site.name for site in subnet.sites]
    weights, history = subnet.schedule.tensors(), subnet.schedule.history
    if any(family.conditional_first for family in FAMILIES if family.denoiser_class == subnet.model.class_name):
        weights = {name: array.flip(2) if array.ndim == 4 else array for name, array in weights.items()}
    caches: list[list[list[torch.Tensor]]] = [[] for _ in names]  # by site, newest first
    step = -1

    def begin(module: nn.Module, args: Any) -> None:
        nonlocal step
        step = (step + 1) % subnet.calls
        if step == 0:
            for cache in caches:
                cache.clear()

    def intercept(site: int, compute: Callable[[], Any]) -> Any:
        if subnet.gates[step, site]:
            output = compute()
            tensors, rebuilds[site] = take_apart(output)
            caches[site].insert(0, tensors)
            del caches[site][history:]
            return output
        outputs = list(zip(*caches[site], strict=True))  # outputs x history
        if not weights:
            return rebuilds[site]([output[0] for output in outputs])
        served = [
            combine(output, weights[backup_name(names[site], k)][step], subnet.sites[site].channel_axis)
            for k, output in enumerate(outputs)
        ]
        return rebuilds[site](served)

    rebuilds: dict[int, Rebuild] = {}
    hook = denoiser.register_forward_pre_hook(begin)
    try:
        with intercepting(denoiser, names, intercept):
            yield
    finally:
        hook.remove()
