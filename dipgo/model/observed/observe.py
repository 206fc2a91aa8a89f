"""Observe a pipeline: run it a few times around stand-ins, and tell what its loop does.

It runs at two prompts, two seeds, two guidance scales and on two images at once; what an argument of the denoiser
changes with says what it is (:mod:`~dipgo.model.observed.template`). How calls become what the scheduler is given is
fitted (:mod:`~dipgo.model.observed.guide`), and the scheduler is replayed as a table. In the end all of that is put
together again and compared with the latents that the pipeline itself had: what does not reproduce is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from inspect import signature
from typing import Any

import torch
from torch.utils import _pytree as pytree

from dipgo.base.errors import DipgoError, UsageError, one_line
from dipgo.model.checks import pictures_of
from dipgo.model.observed.guide import Guide, fit_guide
from dipgo.model.observed.latents import decoding_of, noise_of
from dipgo.model.observed.log import Call, Log
from dipgo.model.observed.observation import Observation, joined_conditions, moment_of
from dipgo.model.observed.request import PROMPTS, Request, guidance_argument
from dipgo.model.observed.roles import Views, roles_of
from dipgo.model.observed.stand_ins import other_texts
from dipgo.model.observed.template import Template, names_of, same
from dipgo.model.observed.watch import Watch, watch


def observe(pipe: Any, component: str, request: Request) -> Observation:
    """Observe a pipeline with its own scheduler.

    Raises:
        UsageError: it cannot be run, or its loop is none that can be made again, with the reason.
    """
    try:
        seen = _with_pictures_at_need(pipe, component, request)
        return seen if request.size is None or request.size == seen.size else _at_size(pipe, component, request, seen)
    except DipgoError:
        raise
    except Exception as error:  # whatever inputs of unknown kinds may lead to
        raise UsageError(
            f"{type(pipe).__name__} is not supported: it cannot be observed ({one_line(error)})"
        ) from error


def _with_pictures_at_need(pipe: Any, component: str, request: Request) -> Observation:
    """Return what is observed without pictures; where a pipeline does nothing without, with some."""
    try:
        return _observe(pipe, component, request)
    except UsageError:
        if not pictures_of(type(pipe)):
            raise
    try:
        return _observe(pipe, component, replace(request, pictures=True))
    except UsageError as error:
        if "pictures" in str(error):
            raise
        joined = "of those that start from pictures the ones are supported that lay these beside the latent alone"
        raise UsageError(f"{error}; {joined}") from error


def _at_size(pipe: Any, component: str, request: Request, seen: Observation) -> Observation:
    """Return what is observed where images are of the size that is wanted, and not as asked for.

    The VAE may be of another scale than its pipeline takes it for.
    """
    assert request.size is not None
    assert seen.size is not None
    scaled = [side * side / made for side, made in zip(request.size, seen.size, strict=True)]
    again = replace(request, pictures=seen.pictures, size=(round(scaled[0]), round(scaled[1])))
    other = _observe(pipe, component, again)
    if other.size == request.size:
        return other
    made, asked = ("x".join(map(str, size)) for size in (seen.size, request.size))
    raise UsageError(f"{type(pipe).__name__} makes images of {made} where {asked} are asked for; give --size {made}")


def _observe(pipe: Any, component: str, request: Request) -> Observation:
    name = type(pipe).__name__
    if request.guidance is None:
        option = signature(type(pipe).__call__).parameters.get(guidance_argument(pipe, component))
        request = replace(request, guidance=float(option.default) if option and option.default is not None else 1.0)
    assert request.guidance is not None

    def seen(steps: int, **changes: Any) -> Log:
        asked = replace(request, **changes)
        how = Watch(component, steps=steps, beyond=steps > request.steps)
        return watch(pipe, asked.inputs(pipe, component), how)

    first = seen(10**6)
    if not first.steps or not first.calls or not first.drawn:
        raise UsageError(f"{name} draws no noise, or calls neither denoiser nor scheduler as others do; not supported")
    with other_texts():  # of a prompt too long for its tokens nothing may be left
        prompt = seen(1, prompts=PROMPTS[1:])
    seed = seen(1, seed=1)
    calls = first.calls_of(0)
    scale = _or_none(seen, 1, guidance=_another(request.guidance))
    if scale is None or _rows(scale.calls_of(0)) != _rows(calls):  # it takes none, or guides from just there on
        scale = first
    both = _or_none(seen, 1, prompts=PROMPTS)
    latent = first.steps[0].latent
    try:
        if any(len(first.calls_of(step)) != len(calls) for step in range(len(first.steps))):
            raise UsageError("it calls its denoiser more often in some steps than in others")
        guides = {
            fit_guide([call.output for call in first.calls_of(step)], first.steps[step].output, request.guidance)
            for step in range(len(first.steps))
        }
        if len(guides) > 1:
            raise UsageError("its guidance changes from step to step")
        guide = guides.pop()
        views = Views(
            names=names_of(calls[0].arguments),
            steps=[_leaves(first.calls_of(step)[0], calls[0]) for step in range(len(first.steps))],
            passes=[_leaves(call, calls[0]) for call in calls],
            prompt=_leaves(prompt.calls[0], calls[0]),
            seed=_leaves(seed.calls[0], calls[0]),
            scale=_leaves(scale.calls[0], calls[0]),
            both=_leaves(both.calls[0], None) if both else None,
            latents=[step.latent for step in first.steps],
        )
        template = Template(
            pytree.tree_flatten(calls[0].arguments)[1], roles_of(views, guide.passes if guide.batched else 1)
        )
    except UsageError as error:
        raise UsageError(f"{name} is not supported: {error}") from error
    noise, scales = noise_of(pipe, request, component, first)
    decoding, size = decoding_of(pipe, request, component, latent)
    bare = Observation(
        component=component,
        guidance=request.guidance,
        size=size or request.size,
        asked=request.size,
        pictures=request.pictures,
        template=template,
        guide=guide,
        processors=_processors(first, guide, name),
        conditions={},
        fixed={},
        scales={},
        latent=tuple(latent.shape[1:]),
        noise=noise,
        scales_noise=scales,
        decoding=decoding,
        width=calls[0].output.shape[1],
        embeds=any(not same(one, other) for one, other in zip(views.scale, views.steps[0], strict=True)),
        usual=first.settings.keys() == {"num_inference_steps"}
        and all(
            moment_of(template, first.calls_of(k)[0].arguments) == float(step.timestep)
            for k, step in enumerate(first.steps)
        ),
    )
    rows = joined_conditions(bare, [template.conditions(call.arguments) for call in calls])
    other = joined_conditions(bare, [template.conditions(call.arguments) for call in prompt.calls_of(0)])
    fixed = {
        name: value[-1:] for name, value in rows.items() if same(value, other[name]) and same(value[:1], value[-1:])
    }
    elsewhere = joined_conditions(bare, [template.conditions(call.arguments) for call in scale.calls_of(0)])
    factors = {name: _factor(value, elsewhere[name][-1:], request.guidance) for name, value in fixed.items()}
    return replace(
        bare,
        conditions={name: value[-1:] for name, value in rows.items()},
        fixed=fixed,
        scales={name: factor for name, factor in factors.items() if factor},
    )


def _processors(seen: Log, guide: Guide, name: str) -> Mapping[str, Any]:
    """Return what did the denoiser's attention in a run, by module, where that is not its own."""
    own = [call.processors for call in seen.calls]
    if any(each != own[0] for each in own):
        raise UsageError(f"{name} is not supported: it replaces its denoiser's attention from step to step")
    if own[0] and guide.kind != "perturbed":
        raise UsageError(f"{name} is not supported: it replaces its denoiser's attention, without a pass for it")
    return own[0]


def _factor(value: torch.Tensor, other: torch.Tensor, guidance: float) -> float | None:
    """Return how many times the guidance scale a condition is, whose value at another scale is ``other``."""
    factor = float(value.flatten()[0]) / guidance if guidance and value.numel() == 1 else 0.0
    return factor if factor and not same(value, other) and same(value / guidance, other / _another(guidance)) else None


def _leaves(call: Any, like: Any) -> list[Any]:
    leaves, tree = pytree.tree_flatten(call.arguments)
    if like is not None and tree != pytree.tree_flatten(like.arguments)[1]:
        raise UsageError("the arguments of its denoiser change their structure")
    return leaves


def _or_none(seen: Callable[..., Log], *args: Any, **changes: Any) -> Log | None:
    try:
        return seen(*args, **changes)
    except UsageError:  # of what it does not take
        return None


def _rows(calls: Sequence[Call]) -> list[int]:
    return [len(call.output) for call in calls]


def _another(scale: float) -> float:
    """Return another guidance scale, which takes as many passes: above 1 two, else one."""
    return float(scale) + 0.5 if scale > 1 else float(scale) / 2
