"""What a search works on: a model, its trace, its sampler, and where noise and conditions come from."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dipgo.base.errors import UsageError
from dipgo.base.guidance import spread_of
from dipgo.base.records import SamplerIdentity
from dipgo.eager.sampling import Batch, Sampling
from dipgo.eager.trajectory import Trajectory
from dipgo.graph.trace import Trace, trace
from dipgo.model.families import Family, GuidedDenoiser
from dipgo.model.models import Model
from dipgo.model.prompts import read_prompts
from dipgo.model.sampler import Sampler, make_scheduler
from dipgo.schedule.schedule import Schedule
from dipgo.schedule.search_record import SearchRecord
from dipgo.schedule.subnet import SubNet, make_subnet


@dataclass(frozen=True)
class Task:
    """A model with everything that the search needs of it."""

    model: Model
    pipe: Any
    trace: Trace
    trajectory: Trajectory
    sampling: Sampling

    @property
    def sampler(self) -> Sampler:
        return self.trajectory.sampler

    @property
    def guidance_scale(self) -> float:
        return self.trajectory.guided.guidance_scale

    @property
    def identity(self) -> SamplerIdentity:
        return self.sampler.identity(self.guidance_scale)

    def draw(self, count: int, seed: int) -> Batch:
        """Return noise and conditions of ``count`` images; see :meth:`~dipgo.eager.trajectory.Sampling.draw`."""
        return self.sampling.draw(count, seed, self.sampler.draws)

    def with_sampler(self, scheduler: Any, steps: int) -> Task:
        """Return the same task under another sampler."""
        return self.with_trajectory(sampler=self.model.family.table(scheduler, steps))

    def with_sites(self, sites: str) -> Task:
        """Return the same task on other sites, given as for :func:`make_task`."""
        traced = trace(self.model, sites, self.guidance_scale)
        return replace(self, trace=traced).with_trajectory(sites=traced.sites, live_sites=traced.live_sites)

    def with_trajectory(self, **changes: Any) -> Task:
        """Return the same task with attributes of its trajectory changed: ``precision``, ``recompute``, …"""
        return replace(self, trajectory=replace(self.trajectory, **changes))

    def subnet(self, schedule: Schedule, **record: Any) -> SubNet:
        """Return the SubNet that a canonical schedule is here; ``record`` is what its search record says."""
        return make_subnet(self.trace, self.identity, schedule, SearchRecord(**record))

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode final latents to images in [-1, 1], not clamped; float32, and gradient passes.

        Where the pipeline has no VAE the latents are the images.
        """
        vae, to_vae = getattr(self.pipe, "vae", None), self.model.family.to_vae
        return (
            latents if vae is None or to_vae is None else vae.decode(to_vae(latents, vae.config), return_dict=False)[0]
        )


@dataclass(frozen=True)
class Choices:
    """What noise is paired with.

    Attributes:
        prompts: a file with one prompt a line, to draw from where prompts condition; None draws from those that the
            model's folder brings, see :meth:`dipgo.model.models.Model.prompts`, else the empty prompt.
        classes: names or numbers joined by commas, to draw from where classes condition; None or ``all`` draws from
            all that have names.
    """

    prompts: Path | None = None
    classes: str | None = None


ALL_CHOICES = Choices()


def make_task(
    model: Model,
    steps: int,
    sampler: str | None = None,
    sites: str | Trace | None = None,
    guidance_scale: float | None = None,
    device: str = "cpu",
    choices: Choices = ALL_CHOICES,
) -> Task:
    """Load a model and prepare a search on it.

    Args:
        steps: inference steps.
        sampler: alias or class of a diffusers scheduler; None keeps the pipeline's own.
        sites: granularity or patterns, or a trace to use again, which must fit the other arguments; None takes the
            family's default.
        guidance_scale: None takes the default of the pipeline's ``__call__``.
        device: where to run, as torch names it, or ``auto``.

    Raises:
        UsageError, DipgoError: see :func:`~dipgo.model.sampler.tabulate`, :func:`~dipgo.graph.trace.trace` and
            :func:`choices_of`.
    """
    place = _device(device)
    if guidance_scale is None:
        guidance_scale = model.default_guidance
    model = model.at(guidance_scale)
    _check_spread(model, guidance_scale)
    pipe = model.pipeline()
    drawn_from = choices_of(model.family, model.labels(), choices.prompts, choices.classes, model.prompts())
    if place.type != "cpu":
        pipe.to(place)
    scheduler = make_scheduler(sampler, model.scheduler)
    table = model.family.table(scheduler, steps)
    traced = sites if isinstance(sites, Trace) else trace(model, sites, guidance_scale)
    family = model.family
    denoiser = family.denoiser(pipe)
    guided = GuidedDenoiser(denoiser, family, guidance_scale)
    sampling = Sampling(pipe, guided, family, model.latent_shape(1), drawn_from)
    return Task(model, pipe, traced, Trajectory(guided, traced.sites, table, traced.live_sites), sampling)


def choices_of(
    family: Family, labels: Mapping[str, int], prompts: Path | None, classes: str | None, own: Sequence[str] = ()
) -> list[Any]:
    """Return the classes or prompts that noise is paired with; ``own`` are the prompts where none are given.

    Raises:
        UsageError: prompts for a model that classes condition or the reverse, or a class that the model lacks.
        DipgoError: a prompt file that is missing, empty or not UTF-8.
    """
    if family.conditioned_by == "nothing":
        if prompts is not None or classes is not None:
            raise UsageError("this model is conditioned by nothing; leave --prompts and --classes out")
        return [""]
    if family.conditioned_by == "prompt":
        if classes is not None:
            raise UsageError("this model is conditioned by prompts, not classes; give --prompts FILE")
        return read_prompts(prompts) if prompts else list(own) or [""]
    if prompts is not None:
        raise UsageError("this model is conditioned by classes, not prompts; give --classes")
    if classes is None or classes == "all":
        return sorted(set(labels.values()))
    known = {str(number): number for number in labels.values()} | dict(labels)
    chosen = [part.strip() for part in classes.split(",") if part.strip()]
    unknown = [name for name in chosen if name not in known]
    if unknown or not chosen:
        raise UsageError(f"class '{', '.join(unknown)}' is unknown; give names or numbers such as {_some(labels)}")
    return sorted({known[name] for name in chosen})


def _some(labels: Mapping[str, int]) -> str:
    return ", ".join(itertools.islice(labels, 3)) + ("" if len(labels) <= 3 else ", …")


def _device(name: str) -> torch.device:
    """Return torch's device of a name; ``auto`` is the GPU where torch has one, else the CPU."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        detail = str(error).splitlines()[0]
        raise UsageError(
            f"device '{name}' cannot be used here ({detail}); use auto, cpu, or cuda where torch has it"
        ) from error
    local = os.environ.get("LOCAL_RANK")
    return torch.device(device.type, int(local)) if local and device.type == "cuda" and device.index is None else device


def _check_spread(model: Model, scale: float) -> None:
    """Refuse a range of guidance scales at some of which there is none, or that nothing can be changed by."""
    low, high = scale - spread_of(scale), scale + spread_of(scale)
    family, at_low = model.family, model.at(low).family if low < scale else model.family
    if low < scale and not (at_low.guides(low) if family.guides(scale) else family.scales):
        raise UsageError(
            f"--guidance {low:g}:{high:g}: the pipeline makes no guidance at {low:g}; give a range above it, or one "
            "number"
        )
