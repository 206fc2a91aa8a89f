"""A family for any diffusers pipeline: what it does is observed, not known (:mod:`dipgo.model.observed`)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from dipgo.base.errors import DipgoWarning, UsageError
from dipgo.base.guidance import rescale_of
from dipgo.base.records import read_json
from dipgo.model.families.dit import DIT
from dipgo.model.families.family import Conditions, Family, Prompting
from dipgo.model.families.pixart import PIXART_ALPHA
from dipgo.model.families.sites import OBSERVED, sites_of_lists
from dipgo.model.families.unet import UNET
from dipgo.model.observed.attention import attention_by
from dipgo.model.observed.forms import form_of
from dipgo.model.observed.log import first_of
from dipgo.model.observed.observation import Observation, conditions_of
from dipgo.model.observed.observe import observe
from dipgo.model.observed.prompts import observe_prompts
from dipgo.model.observed.request import Request, guidance_argument
from dipgo.model.sampler import Sampler
from dipgo.model.skeleton import skeleton

_SITES = OBSERVED | {family.denoiser_class: family.sites for family in (DIT, PIXART_ALPHA, UNET)}


def observed_family(folder: Path, component: str, pixels: tuple[int, int] | None = None) -> Family:
    """Return the family of the pipeline in a folder, whose weights are not read.

    It is for the pipeline's own guidance, and its own size where ``pixels`` says no other; for further ones see
    :meth:`~.family.Family.at`.

    Raises:
        UsageError: the pipeline cannot be run, or its loop is none that can be made again.
    """
    pipe = _skeleton(folder, (folder / "model_index.json").stat().st_mtime_ns)
    return family_of_observed(pipe, component, Request(size=pixels))


def family_of_observed(pipe: Any, component: str, request: Request) -> Family:
    """Return the family of a pipeline as :func:`~dipgo.model.observed.observe.observe` sees it.

    Raises:
        UsageError: see :func:`observed_family`.
    """
    seen = _observed(pipe, component, request)
    denoiser_class = type(getattr(pipe, component)).__name__
    sites = _SITES.get(denoiser_class) or sites_of_lists(getattr(pipe, component))

    def example(config: Mapping[str, Any], rows: int) -> Conditions:
        return {
            name: value.expand(rows, *value.shape[1:]).contiguous() if name in seen.fixed else _blank(value, rows)
            for name, value in seen.conditions.items()
        }

    def call(denoiser: nn.Module, sample: torch.Tensor, timestep: torch.Tensor, given: Conditions) -> torch.Tensor:
        with attention_by(denoiser, seen.processors):
            output = first_of(form_of(denoiser).forward(denoiser, **seen.template.arguments(sample, timestep, given)))
        return seen.guide.sign * output if seen.guide.sign < 0 else output

    def encode(pipe: Any, prompts: Sequence[Any]) -> tuple[Conditions, Conditions]:
        made = conditions_of(seen, pipe, prompts, seen.guidance)
        if seen.guide.passes == 1:
            return made, made
        return tuple({name: value.chunk(2)[half] for name, value in made.items()} for half in (0, 1))  # type: ignore[return-value]

    def tabulated(scheduler: Any, steps: int) -> Sampler:
        return seen.tabulate(pipe, scheduler, steps)

    def decode(latents: torch.Tensor, config: Any) -> torch.Tensor:
        assert seen.decoding is not None
        return seen.decoding(latents)

    def under(scale: float, pixels: tuple[int, int] | None) -> Family:
        return family_of_observed(pipe, component, Request(scale, pixels or seen.size))

    return Family(
        denoiser_class=denoiser_class,
        pipelines=(),
        component=component,
        conditioned_by="prompt" if seen.conditions.keys() - seen.fixed.keys() else "nothing",
        sites=sites,
        granularity=next((each for each in ("layer", "block") if each in sites), None),
        encode=encode,
        example=example,
        call=call,
        table=tabulated,
        prompting=lambda config: _prompting(pipe, seen),
        guides=lambda scale: seen.guide.passes > 1,
        perturbs=seen.guide.kind == "perturbed",
        guide=seen.guide.combine,
        neutral=seen.guide.neutral,
        scales=seen.scales,
        latent=lambda config: seen.latent,
        noise=None if seen.noise.idle else seen.noise,
        to_vae=decode if seen.decoding else None,
        from_vae=lambda values, config: seen.decoding.inverse(values) if seen.decoding else values,
        under=under,
        scale=seen.guidance,
        scale_argument=guidance_argument(pipe, component),
        fixed=seen.fixed,
        pixels=None if seen.any_size else seen.size,
        seen=seen,
        upcasts_vae=lambda config: hasattr(pipe, "upcast_vae"),  # which pipelines have that do it
    )


@lru_cache(maxsize=4)
def _skeleton(folder: Path, changed: int) -> Any:
    """Return a folder's pipeline without weights; ``changed`` is when its index last changed."""
    return skeleton(folder, read_json(folder / "model_index.json", "model_index.json"))


_SEEN: WeakKeyDictionary[Any, dict[Any, Observation]] = WeakKeyDictionary()


def _observed(pipe: Any, component: str, request: Request) -> Observation:
    """Return what a pipeline does, observed once for each guidance scale and size."""

    def key(guidance: float | None, size: tuple[int, int] | None) -> Any:
        return component, guidance, rescale_of(guidance or 0.0), size, type(pipe.scheduler)

    seen = _SEEN.setdefault(pipe, {})
    asked = key(request.guidance, request.size)
    if asked not in seen:
        observation = observe(pipe, component, request)
        seen |= dict.fromkeys((asked, key(observation.guidance, observation.size)), observation)
    return seen[asked]


_READ: WeakKeyDictionary[Any, dict[Any, Prompting | None]] = WeakKeyDictionary()


def _prompting(pipe: Any, seen: Observation) -> Prompting | None:
    """Return how the pipeline reads prompts; None where bundles of it take embeddings, which a warning says."""
    if not any(name.startswith("tokenizer") and part is not None for name, part in pipe.components.items()):
        return None
    known, key = _READ.setdefault(pipe, {}), (seen.component, seen.guidance, seen.size)
    if key not in known:
        try:
            known[key] = observe_prompts(pipe, seen)
        except UsageError as error:
            known[key] = None
            warnings.warn(f"bundles of it take embeddings, not prompts: {error}", DipgoWarning, stacklevel=2)
    return known[key]


def _blank(value: torch.Tensor, rows: int) -> torch.Tensor:
    """Return zeros where values come from a text encoder; masks are of ones, so that everything is looked at."""
    shape = (rows, *value.shape[1:])
    return torch.zeros(shape, dtype=value.dtype) if value.is_floating_point() else torch.ones(shape, dtype=value.dtype)
