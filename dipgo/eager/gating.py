"""Gated execution: run a denoiser with some of its sites skipped, without touching its code.

One primitive, :func:`intercepting`, replaces the ``forward`` of each site while a context lasts. :func:`gated` uses
it to run a whole diffusers pipeline under a SubNet; the search uses it for one differentiable step.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dipgo.base.errors import DipgoWarning
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
def gated(denoiser: nn.Module, subnet: SubNet, start: int = 0, guided: bool = True) -> Iterator[None]:
    """Run ``denoiser`` under ``subnet``: the calls within the context are the steps of the trajectory, in order.

    The passes of guidance lie in the batch as the class's own pipeline has them, or are calls of their own. Skipped
    sites are not executed; they serve their backup. After the last step the count starts again, with empty caches, so
    one context may hold several trajectories.

    ``start`` is the call that trajectories begin at, as those of image-to-image pipelines do. All sites are computed
    there, and a backup that combines several past outputs finds that one in the place of each. Not ``guided`` is a
    pipeline that is asked for no guidance, and makes the conditional pass alone.

    Warns:
        DipgoWarning: when the context ends after other calls than those of whole trajectories, as when a pipeline was
            interrupted, or made other steps or passes than the SubNet's.
    """
    names = [site.name for site in subnet.sites]
    weights, history = subnet.schedule.tensors(), subnet.schedule.history
    passes = subnet.sampler.passes
    registered = [family for family in FAMILIES if family.denoiser_class == subnet.model.class_name]
    conditional_first = passes.conditional_first or any(family.conditional_first for family in registered)
    if conditional_first:
        weights = {name: array.flip(2) if array.ndim == 4 else array for name, array in weights.items()}
    calls, first_pass = (passes.calls, 0) if guided else (1, 1 - conditional_first)
    caches: list[list[list[list[torch.Tensor]]]] = [[[] for _ in names] for _ in range(calls)]  # newest first
    call, steps = -1, subnet.calls - start

    def begin(module: nn.Module, args: Any) -> None:
        nonlocal call
        call = (call + 1) % (steps * calls)
        if call < calls:
            for cache in caches[call]:
                cache.clear()

    def intercept(site: int, compute: Callable[[], Any]) -> Any:
        step, number = divmod(call, calls)
        step += start
        cache = caches[number][site]
        if subnet.gates[step, site] or step == start:
            output = compute()
            tensors, rebuilds[site] = take_apart(output)
            cache[:0] = [tensors] * (history if step == start > 0 else 1)
            del cache[history:]
            return output
        outputs = list(zip(*cache, strict=True))  # outputs x history
        if not weights:
            return rebuilds[site]([output[0] for output in outputs])
        served = [
            combine(
                output[: subnet.gates[:step, site].sum()],  # what there is from the first step on
                of_pass(weights[backup_name(names[site], k)][step], first_pass + number),
                subnet.sites[site].channel_axis,
            )
            for k, output in enumerate(outputs)
        ]
        return rebuilds[site](served)

    def of_pass(weight: torch.Tensor, number: int) -> torch.Tensor:
        apart = weight.ndim == 3 and (passes.calls > 1 or not guided)
        return weight[:, number] if apart else weight

    rebuilds: dict[int, Rebuild] = {}
    first: nn.Module = getattr(denoiser, "controlnet", denoiser)  # which its pipeline calls before the rest
    hook = first.register_forward_pre_hook(begin)
    try:
        with intercepting(denoiser, names, intercept):
            yield
        if (call + 1) % (steps * calls):
            warnings.warn(
                f"the denoiser ended at call {call + 1} of {steps * calls}, which the SubNet's {steps} steps make; "
                "give the pipeline these steps and the SubNet's guidance",
                DipgoWarning,
                stacklevel=3,
            )
    finally:
        hook.remove()
