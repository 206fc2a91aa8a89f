"""What was observed of a pipeline, and what follows from it: sampler tables, and the conditions of prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from dipgo.base.errors import UsageError
from dipgo.base.guidance import rescale_of
from dipgo.base.layout import Layout
from dipgo.model.guidance import all_passes
from dipgo.model.observed.attention import attention_by
from dipgo.model.observed.guide import Guide
from dipgo.model.observed.latents import Decoding, near
from dipgo.model.observed.log import Log, first_of
from dipgo.model.observed.request import Request, tokens_of
from dipgo.model.observed.stand_ins import denoiser_stand_in
from dipgo.model.observed.template import Constant, Template
from dipgo.model.observed.watch import Watch, watch
from dipgo.model.sampler import Sampler, tabulate


@dataclass(frozen=True)
class Observation:
    """What a pipeline does in its loop.

    Attributes:
        processors: what does the denoiser's attention, by module, where that is not its own.
        guidance: the scale that it was observed at.
        size: of its images in pixels; None where that is not known.
        asked: the size that it is asked for, so that it makes images of :attr:`size`; None is its own.
        pictures: whether it is given pictures.
        conditions: an example of each condition, one row.
        fixed: those that do not depend on the prompt, one row.
        scales: those of them that are so many times the guidance scale.
        latent: its shape, without the batch.
        noise: how what is drawn becomes the latent.
        scales_noise: whether what is drawn is multiplied by the scheduler's ``init_noise_sigma``.
        decoding: None where there is no VAE.
        width: length of the denoiser's output along its first axis after the batch; beyond the latent's is a variance.
        embeds: whether the guidance scale is an input of the denoiser.
        usual: whether ``set_timesteps`` is given a number of steps alone, and the denoiser the scheduler's timesteps.
    """

    component: str
    guidance: float
    size: tuple[int, int] | None
    asked: tuple[int, int] | None
    pictures: bool
    template: Template
    guide: Guide
    processors: Mapping[str, Any]
    conditions: Mapping[str, torch.Tensor]
    fixed: Mapping[str, torch.Tensor]
    scales: Mapping[str, float]
    latent: tuple[int, ...]
    noise: Layout
    scales_noise: bool
    decoding: Decoding | None
    width: int
    embeds: bool
    usual: bool

    @property
    def any_size(self) -> bool:
        """Whether all of it holds for images of other sizes too: nothing is packed, shifted or passed by the size."""
        constants = [role.value for role in self.template.roles if isinstance(role, Constant)]
        return (
            self.usual
            and not self.pictures
            and self.noise.idle
            and len(self.latent) == 3
            and (self.decoding is None or self.decoding.layout.idle)
            and not any(isinstance(value, torch.Tensor) for value in constants)
        )

    def tabulate(self, pipe: Any, scheduler: Any, steps: int) -> Sampler:
        """Return a scheduler's table at a number of steps, as this pipeline uses it.

        A scheduler that the pipeline does not run with is taken where the loop is the usual one (:attr:`usual`).

        Raises:
            UsageError: a scheduler that the pipeline does not run with, or one whose steps are no table.
        """
        own, pipe.scheduler = pipe.scheduler, scheduler
        try:
            request = Request(self.guidance, self.asked, steps, pictures=self.pictures)
            log = watch(pipe, request.inputs(pipe, self.component), Watch(self.component, steps=10**6))
        except UsageError:
            if not self.usual:
                raise
            return replace(tabulate(scheduler, steps, self.scales_noise), passes=self.guide.record)
        finally:
            pipe.scheduler = own
        return self._table(pipe, scheduler, steps, log)

    def _table(self, pipe: Any, scheduler: Any, steps: int, log: Log) -> Sampler:
        """Return the table, after comparing it with what was seen."""
        given = {name: value for name, value in log.steps[0].options.items() if not isinstance(value, torch.Tensor)}
        table = tabulate(scheduler, steps, self.scales_noise, log.settings, log.begin, given)
        if len(log.steps) != table.calls:
            raise UsageError(f"{type(pipe).__name__} makes {len(log.steps)} of {table.calls} steps; not supported")
        moments = [moment_of(self.template, log.calls_of(step)[0].arguments) for step in range(table.calls)]
        self._compare(pipe, replace(table, timesteps=tuple(moments)), log)
        return replace(
            table, timesteps=tuple(moments), pixels=None if self.any_size else self.size, passes=self.guide.record
        )

    def _compare(self, pipe: Any, table: Sampler, log: Log) -> None:
        """Make all steps again by the table, the template and the guide, and compare the latents."""
        denoiser = getattr(pipe, self.component)
        basis = [self.noise(log.drawn[0]).float(), *(noise.float() for noise in log.drawn_in_steps)]
        first = log.calls_of(0)
        conditions = joined_conditions(self, [self.template.conditions(call.arguments) for call in first])
        attention = attention_by(denoiser, self.processors)
        with denoiser_stand_in(denoiser, tokens_of(pipe)), attention, torch.no_grad():
            for step, seen in enumerate(log.steps):
                latent = _combine(table.rows[step], basis)
                if not near(latent, seen.latent):
                    raise UsageError(f"{type(pipe).__name__} does not sample as its parts tell; not supported")
                scaled = (latent * table.input_scale[step]).repeat(self.guide.passes, *[1] * (latent.ndim - 1))
                timestep = torch.full((len(scaled),), table.timesteps[step])
                every = {name: all_passes(value, self.guide.passes) for name, value in conditions.items()}
                output = first_of(denoiser(**self.template.arguments(scaled, timestep, every)))
                basis.append(self.guided(output[:, : latent.shape[1]].float(), self.guidance))
            if not near(_combine(table.rows[len(log.steps)], basis), log.steps[-1].result):
                raise UsageError(f"{type(pipe).__name__} does not sample as its parts tell; not supported")

    def guided(self, output: torch.Tensor, scale: float) -> torch.Tensor:
        """Return what the scheduler is given, of the denoiser's output for all rows, the unconditional ones first."""
        output = self.guide.sign * output
        if self.guide.passes == 1:
            return output
        unconditional, conditional, *perturbed = output.chunk(self.guide.passes)
        return self.guide.combine(unconditional, conditional, float(scale), rescale_of(scale), *perturbed)


def conditions_of(
    observation: Observation, pipe: Any, prompts: Sequence[Any], guidance: float
) -> dict[str, torch.Tensor]:
    """Return what a pipeline passes for some prompts, with guidance the unconditional rows first."""
    request = Request(guidance, observation.asked, prompts=tuple(prompts), pictures=observation.pictures)
    component, rows = observation.component, observation.guide.rows
    calls = 1 if observation.guide.batched else observation.guide.passes
    log = watch(pipe, request.inputs(pipe, component), Watch(component, calls=calls))
    made = joined_conditions(observation, [observation.template.conditions(call.arguments) for call in log.calls])
    for name, value in made.items():
        expected = [rows * len(prompts), *observation.conditions[name].shape[1:]]
        if list(value.shape) != expected:
            raise UsageError(
                f"{type(pipe).__name__} makes '{name}' {list(value.shape)} of these prompts, not {expected}"
            )
    return made


def joined_conditions(observation: Observation, calls: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return the conditions of all rows, the unconditional ones first, from those of each call of a step."""
    guide = observation.guide
    if guide.passes == 1:
        return dict(calls[0])
    both = (
        [{name: value.chunk(guide.passes)[half] for name, value in calls[0].items()} for half in (0, 1)]
        if guide.batched
        else calls
    )
    order = (1 - guide.conditional, guide.conditional)
    for name, value in both[0].items():
        if value.shape != both[1][name].shape:
            raise UsageError(f"the pipeline makes '{name}' as long as the prompt; not supported")
    return {name: torch.cat([both[each][name] for each in order]) for name in both[0]}


def moment_of(template: Template, arguments: Mapping[str, Any]) -> float:
    """Return the timestep in a call's arguments; 0 where it takes none."""
    moment = template.moment(arguments)
    return 0.0 if moment is None else float(moment.flatten()[0])


def _combine(row: np.ndarray, basis: Sequence[torch.Tensor]) -> torch.Tensor:
    total = sum(float(factor) * value for factor, value in zip(row, basis, strict=False))
    assert isinstance(total, torch.Tensor)
    return total
