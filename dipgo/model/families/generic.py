"""A family for any diffusers denoiser that has no entry, made from the signature of its ``forward``.

What its inputs look like is guessed from its configuration; what they hold is read off the pipeline, by stopping it at
its own call of the denoiser. Before that, two calls of the pipeline are compared with this package's own trajectory,
around a stand-in for the denoiser: a pipeline that scales timesteps, orders the passes of guidance or steps in a way of
its own is refused, not approximated.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn

from dipgo.base.errors import UsageError
from dipgo.model.families.family import Conditions, Family, latent_size
from dipgo.model.families.guided import GuidedDenoiser
from dipgo.model.sampler import Sampler, make_scheduler, tabulate

_WIDTHS = ("caption_channels", "joint_attention_dim", "encoder_hid_dim", "cross_attention_dim")  # the first counts
_ASKED_FOR_BY = {  # optional inputs that some configurations make necessary
    "class_labels": ("num_class_embeds", "class_embed_type"),
    "guidance": ("guidance_embeds",),
    "added_cond_kwargs": ("addition_embed_type", "use_additional_conditions"),
}
_NO_CONDITION = ("timestep", "return_dict")
_CURE = "it needs an entry in dipgo/model/families"
_STEPS, _GUIDANCE = 4, 3.0  # while a pipeline is watched
_TOLERANCE = 1e-3


def generic_family(denoiser_class: str, component: str, config: Mapping[str, Any], pipeline_class: str) -> Family:
    """Return a family for a class of diffusers denoiser; its sites are chosen by patterns.

    Args:
        denoiser_class: name of the class, whose ``forward`` takes a latent ``[B, C, H, W]`` first, and ``timestep``.
        component: attribute of the pipeline that holds it.
        config: its configuration.
        pipeline_class: name of the pipeline's class; the default of its ``max_sequence_length`` is the number of text
            tokens (else 77).

    Raises:
        UsageError: diffusers has no such class, or it takes an input that cannot be guessed.
    """
    import diffusers

    model_class = getattr(diffusers, denoiser_class, None)
    if model_class is None:
        raise UsageError(f"the installed diffusers has no {denoiser_class}; install the version the model came from")
    _, latent, *others = inspect.signature(model_class.forward).parameters.values()
    if latent.name not in ("sample", "hidden_states") or "timestep" not in {other.name for other in others}:
        raise UsageError(f"{denoiser_class} is not called on a latent and a timestep; {_CURE}")
    pipeline = getattr(diffusers, pipeline_class, None)
    if pipeline is None:
        raise UsageError(f"the installed diffusers has no {pipeline_class}; only pipelines of its own are supported")
    length = inspect.signature(pipeline.__call__).parameters.get("max_sequence_length")
    tokens = length.default if length and isinstance(length.default, int) else 77
    generic = _Generic(denoiser_class, component, latent.name, tuple(others), tokens)
    return generic.family(bool(generic.example(config, 1)))


@dataclass(frozen=True, eq=False)
class _Generic:
    """A class of denoiser as its signature shows it.

    Attributes:
        latent: name of the first parameter of its ``forward``.
        others: the further ones.
        tokens: text tokens in a prompt's embedding.
        checked: the pipelines that were found to sample as this package does.
    """

    denoiser_class: str
    component: str
    latent: str
    others: tuple[inspect.Parameter, ...]
    tokens: int
    checked: WeakSet[Any] = field(default_factory=WeakSet)

    def family(self, prompted: bool) -> Family:
        return Family(
            denoiser_class=self.denoiser_class,
            pipelines=(),
            component=self.component,
            conditioned_by="prompt" if prompted else "nothing",
            sites={},
            granularity=None,
            encode=self.encode,
            check=self.check,
            example=self.example,
            call=self.call,
            scales_noise=False,  # some pipelines do; the schedulers for which it matters are refused
            upcasts_vae=lambda config: True,  # not known, and float32 is right in any case
        )

    def example(self, config: Mapping[str, Any], rows: int) -> Conditions:
        given = {}
        for parameter in self.others:
            name = parameter.name
            value = self._guess(name, config, rows)
            if value is not None:
                given[name] = value
                continue
            required = parameter.default is parameter.empty and name not in _NO_CONDITION
            if required or any(config.get(entry) for entry in _ASKED_FOR_BY.get(name, ())):
                raise UsageError(f"{self.denoiser_class} takes '{name}', which dipgo cannot make up; {_CURE}")
        return given

    def _guess(self, name: str, config: Mapping[str, Any], rows: int) -> torch.Tensor | None:
        width = next((config[entry] for entry in _WIDTHS if config.get(entry)), None)
        pooled = config.get("pooled_projection_dim")
        if name == "encoder_hidden_states" and width:
            return torch.zeros(rows, self.tokens, width)
        if name == "encoder_attention_mask" and width:
            return torch.ones(rows, self.tokens, dtype=torch.int64)
        if name == "pooled_projections" and pooled:
            return torch.zeros(rows, pooled)
        return None

    def call(
        self, denoiser: nn.Module, sample: torch.Tensor, timestep: torch.Tensor, given: Conditions
    ) -> torch.Tensor:
        return denoiser(**{self.latent: sample}, timestep=timestep, **given, return_dict=False)[0]

    def encode(self, pipe: Any, given: Sequence[Any]) -> tuple[Conditions, Conditions]:
        example = self.example(getattr(pipe, self.component).config, 1)
        if pipe not in self.checked:
            self.check(pipe)
        if not example:
            return {}, {}
        both = self._conditions(pipe, self._watch(pipe, given, 1)[0], example)
        return {name: value[: len(given)] for name, value in both.items()}, {
            name: value[len(given) :] for name, value in both.items()
        }

    def _watch(self, pipe: Any, given: Sequence[Any], calls: int) -> list[dict[str, Any]]:
        """Run the pipeline until its call number ``calls`` of the denoiser; return the arguments of each."""
        denoiser = getattr(pipe, self.component)
        signature = inspect.signature(type(denoiser).forward)
        seen: list[dict[str, Any]] = []

        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            seen.append(dict(signature.bind(module, *args, **kwargs).arguments))
            if len(seen) == calls:
                raise _Seen

        height, width = latent_size(denoiser.config)
        scale = getattr(pipe, "vae_scale_factor", 1)
        offered = {
            "prompt": list(given),
            "batch_size": len(given),
            "height": height * scale,
            "width": width * scale,
            "guidance_scale": _GUIDANCE,
            "generator": _generator(),
            "output_type": "latent",
            "num_inference_steps": _STEPS,
        }
        accepted = inspect.signature(pipe.__call__).parameters
        pipe.set_progress_bar_config(disable=True)
        handle = denoiser.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            pipe(**{name: value for name, value in offered.items() if name in accepted})
        except _Seen:
            return seen
        except Exception as error:  # whatever a pipeline may raise
            raise UsageError(f"{type(pipe).__name__} cannot be run ({' '.join(str(error).split())[:160]})") from error
        finally:
            handle.remove()
        raise UsageError(f"{type(pipe).__name__} calls its denoiser {len(seen)} times in {_STEPS} steps; {_CURE}")

    def _conditions(self, pipe: Any, arguments: dict[str, Any], example: Conditions) -> Conditions:
        """Return the conditions in a call's arguments, and refuse those that a trace would not know."""
        ignored = ("self", self.latent, *_NO_CONDITION)
        passed = {name: value for name, value in arguments.items() if name not in ignored and value is not None}
        for name in passed.keys() ^ example.keys():
            verb = "passes" if name in passed else "does not pass"
            raise UsageError(f"{type(pipe).__name__} {verb} '{name}' to {self.denoiser_class}; {_CURE}")
        for name, value in passed.items():
            if value.shape[1:] != example[name].shape[1:]:
                raise UsageError(
                    f"{type(pipe).__name__} passes '{name}' of shape {list(value.shape)}, not "
                    f"{list(example[name].shape)}; {_CURE}"
                )
        return {name: value.to(example[name].dtype) for name, value in passed.items()}

    def check(self, pipe: Any, scheduler: Any = None) -> None:
        """Compare the pipeline's first step under a scheduler with the same step by the sampler's table.

        A pipeline whose own sampler has no table (DDPM draws noise, others clip) is checked with DDIM, which does not.
        """
        denoiser = getattr(pipe, self.component)
        denoiser.forward = self._stand_in(denoiser)
        try:
            self._compare(pipe, self.example(denoiser.config, 1), scheduler)
        finally:
            del denoiser.forward
        self.checked.add(pipe)

    def _first_steps(self, pipe: Any, *schedulers: Any) -> tuple[Sampler, dict[str, Any], dict[str, Any]]:
        """Return the table of the first scheduler that has one and that the pipeline runs, and two calls under it."""
        for scheduler in schedulers:
            try:
                table = tabulate(make_scheduler(None, scheduler), _STEPS, scales_noise=False)
                pipe.scheduler = scheduler
                first, second = self._watch(pipe, ["a"], 2)
                return table, first, second
            except UsageError as error:
                reason = error
        raise reason

    def _stand_in(self, denoiser: Any) -> Callable[..., Any]:
        """Return a ``forward`` that takes no time: its output tells rows, timesteps and conditions apart."""
        signature, channels = inspect.signature(type(denoiser).forward), denoiser.config.get("out_channels")

        def forward(*args: Any, **kwargs: Any) -> Any:
            arguments = signature.bind(denoiser, *args, **kwargs).arguments
            sample = arguments[self.latent]
            output = sample / 2 + torch.as_tensor(arguments["timestep"], dtype=sample.dtype).reshape(-1, 1, 1, 1) / 1000
            for parameter in self.others:
                value = arguments.get(parameter.name)
                if isinstance(value, torch.Tensor) and parameter.name not in _NO_CONDITION:
                    output = output + value.flatten(1).to(sample.dtype).mean(1).reshape(-1, 1, 1, 1)
            if (missing := (channels or sample.shape[1]) - sample.shape[1]) > 0:  # a learned variance
                output = torch.cat([output, output.new_zeros(len(output), missing, *output.shape[2:])], 1)
            return Transformer2DModelOutput(sample=output) if arguments.get("return_dict", True) else (output,)

        return forward

    def _compare(self, pipe: Any, example: Conditions, scheduler: Any) -> None:
        denoiser, own = getattr(pipe, self.component), pipe.scheduler
        ddim = type(make_scheduler("ddim", own)).from_config(own.config, clip_sample=False, thresholding=False)
        try:
            table, first, second = self._first_steps(pipe, scheduler or own, ddim)
        finally:
            pipe.scheduler = own
        shape = (1, denoiser.config["in_channels"], *latent_size(denoiser.config))
        noise = torch.randn(shape, generator=_generator()).to(pipe.device)
        guided = GuidedDenoiser(denoiser, self.family(bool(example)), _GUIDANCE if example else 1.0)
        conditions = self._conditions(pipe, first, example)
        if any(len(value) != 2 for value in conditions.values()):
            raise UsageError(f"{type(pipe).__name__} does not double its batch for guidance; {_CURE}")
        with torch.no_grad():
            scaled = noise * table.input_scale[0]
            output = guided(scaled, torch.full((1,), table.timesteps[0], device=noise.device), conditions)
        latent = (table.rows[1, 0] * noise + table.rows[1, 1] * output) * table.input_scale[1]
        for expected, seen in ((scaled, first[self.latent]), (latent, second[self.latent])):
            same = expected.shape == seen[:1].shape
            if not same or torch.linalg.norm(seen[:1] - expected) > _TOLERANCE * torch.linalg.norm(expected):
                raise UsageError(f"{type(pipe).__name__} does not sample as dipgo understands its parts; {_CURE}")


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


class _Seen(Exception):
    """Stops a watched pipeline."""
