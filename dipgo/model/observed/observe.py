"""Observe a pipeline: run it a few times around stand-ins, and tell what its loop does.

It runs at two prompts, two seeds, two guidance scales and on two images at once; what an argument of the denoiser
changes with says what it is (:mod:`~dipgo.model.observed.template`). How calls become what the scheduler is given is
fitted (:mod:`~dipgo.model.observed.guide`), and the scheduler is replayed as a table. In the end all of that is put
together again and compared with the latents that the pipeline itself had: what does not reproduce is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from dipgo.base.errors import DipgoError, UsageError, one_line
from dipgo.base.layout import Layout, find_layout
from dipgo.model.observed.guide import Guide, fit_guide
from dipgo.model.observed.stand_ins import denoiser_stand_in, output_like
from dipgo.model.observed.template import Constant, Template, Views, names_of, roles_of, same
from dipgo.model.observed.watch import Log, Watch, first_of, tokens_of, watch
from dipgo.model.sampler import Sampler, tabulate

STEPS = 4  # that a pipeline is watched for, where their number does not matter
PROMPTS = ("a", "a red fox in the snow, and two dogs")
_TOLERANCE = 1e-4  # relative, of a latent


@dataclass(frozen=True)
class Request:
    """What a pipeline is asked for while it is watched.

    Attributes:
        guidance: the guidance scale; None leaves it to the pipeline.
        size: height and width of images in pixels; None leaves them to the pipeline.
    """

    guidance: float | None = None
    size: tuple[int, int] | None = None
    steps: int = STEPS
    prompts: tuple[Any, ...] = PROMPTS[:1]
    seed: int = 0

    def inputs(self, pipe: Any, component: str) -> dict[str, Any]:
        """Return the arguments of the pipeline's call; it may not take all of them."""
        scale = guidance_argument(pipe, component)
        given: dict[str, Any] = {
            "prompt": list(self.prompts),
            "batch_size": len(self.prompts),
            "num_inference_steps": self.steps,
            "generator": torch.Generator().manual_seed(self.seed),
            "output_type": "np",
        }
        if self.size:
            given |= {"height": self.size[0], "width": self.size[1]}
        if self.guidance is not None:
            given[scale] = float(self.guidance)
            given["guidance_rescale"] = getattr(self.guidance, "rescale", 0.0)
        if scale == "true_cfg_scale":
            given["negative_prompt"] = [""] * len(self.prompts)
        return given


@dataclass(frozen=True)
class Decoding:
    """What the VAE is given, of a final latent: laid out anew, times ``scale``, plus ``shift``, by channel."""

    layout: Layout
    scale: torch.Tensor
    shift: torch.Tensor

    def __call__(self, latent: torch.Tensor) -> torch.Tensor:
        moved = latent if self.layout.idle else self.layout(latent)
        return moved * self.scale.to(moved) + self.shift.to(moved)

    def inverse(self, given: torch.Tensor) -> torch.Tensor:
        """Return the latent of what the VAE is given."""
        latent = (given - self.shift.to(given)) / self.scale.to(given)
        return latent if self.layout.idle else self.layout.inverse(latent)


@dataclass(frozen=True)
class Observation:
    """What a pipeline does in its loop.

    Attributes:
        guidance: the scale that it was observed at.
        size: of its images in pixels; None where that is not known.
        asked: the size that it is asked for, so that it makes images of :attr:`size`; None is its own.
        conditions: an example of each condition, one row.
        fixed: those that do not depend on the prompt, one row.
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
    template: Template
    guide: Guide
    conditions: Mapping[str, torch.Tensor]
    fixed: Mapping[str, torch.Tensor]
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
            request = Request(self.guidance, self.asked, steps)
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
        moments = [_moment(self.template, log.calls_of(step)[0].arguments) for step in range(table.calls)]
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
        with denoiser_stand_in(denoiser, tokens_of(pipe)), torch.no_grad():
            for step, seen in enumerate(log.steps):
                latent = _combine(table.rows[step], basis)
                if not _near(latent, seen.latent):
                    raise UsageError(f"{type(pipe).__name__} does not sample as its parts tell; not supported")
                scaled = (latent * table.input_scale[step]).repeat(self.guide.passes, *[1] * (latent.ndim - 1))
                timestep = torch.full((len(scaled),), table.timesteps[step])
                output = first_of(denoiser(**self.template.arguments(scaled, timestep, conditions)))
                basis.append(self.guided(output[:, : latent.shape[1]].float(), self.guidance))
            if not _near(_combine(table.rows[len(log.steps)], basis), log.steps[-1].result):
                raise UsageError(f"{type(pipe).__name__} does not sample as its parts tell; not supported")

    def guided(self, output: torch.Tensor, scale: float) -> torch.Tensor:
        """Return what the scheduler is given, of the denoiser's output for all rows, the unconditional ones first."""
        output = self.guide.sign * output
        if self.guide.passes == 1:
            return output
        unconditional, conditional = output.chunk(2)
        return self.guide.combine(unconditional, conditional, scale)


def guidance_argument(pipe: Any, component: str) -> str:
    """Return the argument that guidance is by: ``true_cfg_scale`` where there is one, and the denoiser takes none."""
    options = signature(type(pipe).__call__).parameters
    embedded = getattr(getattr(pipe, component).config, "guidance_embeds", False)
    true = options.get("true_cfg_scale")
    return (
        "true_cfg_scale"
        if true is not None and true.default and true.default > 1 and not embedded
        else "guidance_scale"
    )


def observe(pipe: Any, component: str, request: Request) -> Observation:
    """Observe a pipeline with its own scheduler.

    Raises:
        UsageError: it cannot be run, or its loop is none that can be made again, with the reason.
    """
    try:
        seen = _observe(pipe, component, request)
        return seen if request.size is None or request.size == seen.size else _at_size(pipe, component, request, seen)
    except DipgoError:
        raise
    except Exception as error:  # whatever inputs of unknown kinds may lead to
        raise UsageError(
            f"{type(pipe).__name__} is not supported: it cannot be observed ({one_line(error)})"
        ) from error


def _at_size(pipe: Any, component: str, request: Request, seen: Observation) -> Observation:
    """Return what is observed where images are of the size that is wanted, and not as asked for.

    The VAE may be of another scale than its pipeline takes it for.
    """
    assert request.size is not None
    assert seen.size is not None
    scaled = [side * side / made for side, made in zip(request.size, seen.size, strict=True)]
    if "use_resolution_binning" not in signature(type(pipe).__call__).parameters:
        other = _observe(pipe, component, replace(request, size=(round(scaled[0]), round(scaled[1]))))
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
        return watch(pipe, asked.inputs(pipe, component), Watch(component, steps=steps))

    first = seen(10**6)
    if not first.steps or not first.calls or not first.drawn:
        raise UsageError(f"{name} draws no noise, or calls neither denoiser nor scheduler as others do; not supported")
    prompt, seed, scale, both = (
        seen(1, prompts=PROMPTS[1:]),
        seen(1, seed=1),
        seen(1, guidance=_more(request.guidance)),
        seen(1, prompts=PROMPTS),
    )
    calls = first.calls_of(0)
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
            both=_leaves(both.calls[0], None),
            latents=[step.latent for step in first.steps],
        )
        template = Template(pytree.tree_flatten(calls[0].arguments)[1], roles_of(views, 2 if guide.batched else 1))
    except UsageError as error:
        raise UsageError(f"{name} is not supported: {error}") from error
    noise, scales = _noise(pipe, request, component, first)
    decoding, size = _decoding(pipe, request, component, latent)
    bare = Observation(
        component=component,
        guidance=request.guidance,
        size=size or request.size,
        asked=request.size,
        template=template,
        guide=guide,
        conditions={},
        fixed={},
        latent=tuple(latent.shape[1:]),
        noise=noise,
        scales_noise=scales,
        decoding=decoding,
        width=calls[0].output.shape[1],
        embeds=any(not same(one, other) for one, other in zip(views.scale, views.steps[0], strict=True)),
        usual=first.settings.keys() == {"num_inference_steps"}
        and all(
            _moment(template, first.calls_of(k)[0].arguments) == float(step.timestep)
            for k, step in enumerate(first.steps)
        ),
    )
    rows = joined_conditions(bare, [template.conditions(call.arguments) for call in calls])
    other = joined_conditions(bare, [template.conditions(call.arguments) for call in prompt.calls_of(0)])
    fixed = {
        name: value[-1:] for name, value in rows.items() if same(value, other[name]) and same(value[:1], value[-1:])
    }
    return replace(bare, conditions={name: value[-1:] for name, value in rows.items()}, fixed=fixed)


def conditions_of(
    observation: Observation, pipe: Any, prompts: Sequence[Any], guidance: float
) -> dict[str, torch.Tensor]:
    """Return what a pipeline passes for some prompts, with guidance the unconditional rows first."""
    request = Request(guidance, observation.asked, prompts=tuple(prompts))
    component, passes = observation.component, observation.guide.passes
    calls = 1 if observation.guide.batched else passes
    log = watch(pipe, request.inputs(pipe, component), Watch(component, calls=calls))
    made = joined_conditions(observation, [observation.template.conditions(call.arguments) for call in log.calls])
    for name, value in made.items():
        expected = [passes * len(prompts), *observation.conditions[name].shape[1:]]
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
        [{name: value.chunk(2)[half] for name, value in calls[0].items()} for half in (0, 1)]
        if guide.batched
        else calls
    )
    order = (1 - guide.conditional, guide.conditional)
    for name, value in both[0].items():
        if value.shape != both[1][name].shape:
            raise UsageError(f"the pipeline makes '{name}' as long as the prompt; not supported")
    return {name: torch.cat([both[each][name] for each in order]) for name in both[0]}


def _leaves(call: Any, like: Any) -> list[Any]:
    leaves, tree = pytree.tree_flatten(call.arguments)
    if like is not None and tree != pytree.tree_flatten(like.arguments)[1]:
        raise UsageError("the arguments of its denoiser change their structure")
    return leaves


def _moment(template: Template, arguments: Mapping[str, Any]) -> float:
    """Return the timestep in a call's arguments; 0 where it takes none."""
    moment = template.moment(arguments)
    return 0.0 if moment is None else float(moment.flatten()[0])


def _more(scale: float) -> float:
    return type(scale)(scale + 0.5) if type(scale) is float else float(scale) + 0.5


def _noise(pipe: Any, request: Request, component: str, seen: Log) -> tuple[Layout, bool]:
    """Return how what is drawn becomes the latent, and whether the scheduler's own factor is on it."""
    drawn, latent = seen.drawn[0], seen.steps[0].latent
    numbers = torch.arange(drawn.numel(), dtype=torch.float32).view(drawn.shape) + 1
    how = Watch(component, steps=1, draw=lambda noise: numbers if noise.shape == drawn.shape else noise)
    moved = watch(pipe, request.inputs(pipe, component), how).steps[0].latent.double()
    factor = float(moved.abs().max()) / drawn.numel()
    places = torch.round(moved / factor).to(torch.int64).numpy() - 1
    layout = find_layout(places[0], tuple(drawn.shape[1:])) if len(places) == len(drawn) == 1 else None
    if layout is None or not _near(layout(drawn).float() * factor, latent):
        raise UsageError(f"{type(pipe).__name__} makes its first latent of noise in a way of its own; not supported")
    sigma = float(getattr(pipe.scheduler, "init_noise_sigma", 1.0))
    if not min(abs(factor - 1), abs(factor - sigma)) < 1e-3 * factor:
        raise UsageError(f"{type(pipe).__name__} starts from noise of its own scale, {factor:g}; not supported")
    return layout, abs(factor - sigma) < 1e-3 * factor


def _decoding(
    pipe: Any, request: Request, component: str, latent: torch.Tensor
) -> tuple[Decoding | None, tuple[int, int] | None]:
    """Return what the VAE is given, from what it is given of latents that are chosen, and the size of its images."""
    if getattr(pipe, "vae", None) is None:
        return None, (int(latent.shape[-2]), int(latent.shape[-1])) if latent.ndim == 4 else None

    def given(values: torch.Tensor) -> torch.Tensor | None:
        how = Watch(component, result=lambda result: values.to(result.dtype))
        return next(iter(watch(pipe, request.inputs(pipe, component), how).decoded), None)

    shift, one = given(torch.zeros_like(latent)), given(torch.ones_like(latent))
    places = torch.arange(latent.numel(), dtype=torch.float32).view(latent.shape)
    numbers = given(places)
    if shift is None or one is None or numbers is None:
        return None, None
    scale = (one - shift).double()
    moved = torch.round((numbers.double() - shift) / scale).to(torch.int64).numpy()
    layout = find_layout(moved[0], tuple(latent.shape[1:]))
    if layout is None:
        raise UsageError(f"{type(pipe).__name__} decodes its latents in a way of its own; not supported")
    images = first_of(output_like(pipe.vae.decode, (shift,), {"return_dict": False}))
    size = (int(images.shape[-2]), int(images.shape[-1]))
    if images.ndim != 4 and images.shape[2] != 1:  # frames, which no bundle decodes
        return None, size
    return Decoding(layout, _by_channel(scale), _by_channel(shift.double())), size


def _by_channel(values: torch.Tensor) -> torch.Tensor:
    """Return ``[1, C, 1, …]`` of values that are the same all over a channel."""
    return values.flatten(2)[:, :, :1].reshape(1, -1, *[1] * (values.ndim - 2)).float()


def _combine(row: np.ndarray, basis: Sequence[torch.Tensor]) -> torch.Tensor:
    total = sum(float(factor) * value for factor, value in zip(row, basis, strict=False))
    assert isinstance(total, torch.Tensor)
    return total


def _near(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape:
        return False
    return bool(torch.linalg.norm(one.float() - other.float()) <= _TOLERANCE * torch.linalg.norm(other.float()))
