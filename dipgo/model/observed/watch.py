"""Run a pipeline, and record what passes between it, its scheduler and its denoiser."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from inspect import signature
from typing import Any
from unittest import mock

import torch
from torch.utils import _pytree as pytree

from dipgo.base.errors import UsageError, one_line
from dipgo.model.checks import SUPPORTED, pictures_of
from dipgo.model.noise_source import drawing
from dipgo.model.observed.attention import processors_of
from dipgo.model.observed.forms import bound, form_of
from dipgo.model.observed.log import Call, Log, Step, plain
from dipgo.model.observed.request import tokens_of
from dipgo.model.observed.stand_ins import denoiser_stand_in, output_like

Draw = Callable[[torch.Tensor], torch.Tensor]


class _Enough(BaseException):
    """Ends a pipeline that is watched; a BaseException, since some pipelines catch the others."""


@dataclass(frozen=True)
class Watch:
    """How a pipeline is watched.

    Attributes:
        component: attribute that holds the denoiser.
        steps: of the scheduler, after which the pipeline is ended; None lets it come to its own end.
        calls: of the denoiser, after which it is ended.
        draw: what takes the place of noise that the pipeline draws, from that noise.
        result: what takes the place of the latent that each step returns.
        beyond: whether it goes on after it has decoded latents, which ends the others.
    """

    component: str
    steps: int | None = None
    calls: int | None = None
    draw: Draw | None = None
    result: Draw | None = None
    beyond: bool = False


def watch(pipe: Any, inputs: Mapping[str, Any], how: Watch) -> Log:
    """Call a pipeline around a stand-in for its denoiser, and return what was seen.

    Args:
        inputs: what its call is offered; what it does not take is left out.

    Raises:
        UsageError: it cannot be run, with its own reason.
    """
    log, denoiser = Log(), getattr(pipe, how.component)
    accepted = signature(type(pipe).__call__).parameters
    needed = [name for name, option in accepted.items() if option.default is option.empty and name != "self"]
    if lacking := [name for name in needed if name not in (*inputs, "args", "kwargs")]:
        raise UsageError(f"{type(pipe).__name__} is not supported: each call of it needs {', '.join(lacking)}")
    pipe.set_progress_bar_config(disable=True)
    with ExitStack() as stack:
        stack.enter_context(denoiser_stand_in(denoiser, tokens_of(pipe)))
        stack.enter_context(_observed_denoiser(denoiser, tokens_of(pipe), log, how))
        stack.enter_context(_observed_scheduler(pipe.scheduler, log, how))
        stack.enter_context(_observed_noise(type(pipe), log.drawn, how.draw))
        stack.enter_context(_observed_noise(type(pipe.scheduler), log.drawn_in_steps))
        if getattr(pipe, "vae", None) is not None:
            stack.enter_context(_observed_decoder(pipe.vae, log, how.beyond))
        stack.enter_context(torch.no_grad())
        try:
            pipe(**{name: value for name, value in inputs.items() if name in accepted})
        except _Enough:
            pass
        except UsageError as error:
            raise UsageError(f"{type(pipe).__name__} is not supported: {error}") from error
        except Exception as error:  # whatever a pipeline may raise
            name, reason = type(pipe).__name__, _reason(error)
            pictures = f"; if it starts from pictures, {SUPPORTED}" if pictures_of(type(pipe)) else ""
            raise UsageError(f"{name} cannot be run here ({reason}){pictures}") from error
    return log


def _reason(error: Exception) -> str:
    """Return what a pipeline says of itself; where it imported a package only if that is there, which."""
    package = error.name if isinstance(error, NameError) else None
    if package and package.islower() and not find_spec(package):
        return f"it needs the package {package}: pip install {package}"
    return one_line(error)


@contextmanager
def _observed_denoiser(denoiser: Any, tokens: int, log: Log, how: Watch) -> Iterator[None]:
    forward, form = denoiser.forward, form_of(denoiser)
    own = processors_of(denoiser)

    def observed(*args: Any, **kwargs: Any) -> Any:
        if log.decoded:
            raise UsageError("it goes on with new noise after it has decoded latents, piece by piece")
        arguments = form.read(bound(denoiser, args, kwargs), tokens)
        output = forward(*args, **kwargs)
        put = {name: each for name, each in processors_of(denoiser).items() if each is not own.get(name)}
        log.calls.append(Call(plain(arguments), plain(form.first(output)), len(log.steps), put))
        if len(log.calls) == how.calls:
            raise _Enough
        return output

    with mock.patch.object(denoiser, "forward", observed):
        yield


@contextmanager
def _observed_scheduler(scheduler: Any, log: Log, how: Watch) -> Iterator[None]:
    def set_timesteps(original: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature(original).bind(*args, **kwargs).arguments
        log.settings = plain({name: value for name, value in given.items() if name != "device"})
        return original(*args, **kwargs)

    def begin(original: Any, begin_index: int = 0) -> Any:
        log.begin = begin_index
        return original(begin_index)

    def scale(original: Any, *args: Any, **kwargs: Any) -> Any:
        scaled = original(*args, **kwargs)
        log.scaled.append(scaled.detach().clone())
        return scaled

    def step(original: Any, model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        given, before, moment = plain(model_output), plain(sample), plain(timestep)
        output = original(model_output, timestep, sample, *args, **kwargs)
        result = output[0] if isinstance(output, tuple) else output.prev_sample
        options = {name: value for name, value in kwargs.items() if name != "return_dict"}
        log.steps.append(Step(given, moment, before, options, result.detach().clone()))
        if len(log.steps) == how.steps:
            raise _Enough
        if how.result is None:
            return output
        change = how.result

        def changed(value: Any) -> Any:  # some hand out the latent twice
            return change(value) if isinstance(value, torch.Tensor) and torch.equal(value, result) else value

        if isinstance(output, tuple):
            return tuple(changed(value) for value in output)
        return type(output)(**{name: changed(value) for name, value in output.items()})

    wrappers: dict[str, Any] = {
        "set_timesteps": set_timesteps,
        "set_begin_index": begin,
        "scale_model_input": scale,
        "step": step,
    }
    with ExitStack() as stack:
        for name, wrapper in wrappers.items():
            original = getattr(scheduler, name, None)
            if original is not None:
                replacement = functools.wraps(original)(functools.partial(wrapper, original))
                stack.enter_context(mock.patch.object(scheduler, name, replacement))
        yield


@contextmanager
def _observed_noise(kind: type, drawn: list[torch.Tensor], change: Draw | None = None) -> Iterator[None]:
    def draw(original: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        noise = original(*args, **kwargs)
        noise = change(noise) if change else noise
        drawn.append(noise.detach().clone())
        return noise

    with drawing(kind, draw):
        yield


@contextmanager
def _observed_decoder(vae: Any, log: Log, goes_on: bool) -> Iterator[None]:
    original = vae.decode

    def decode(latent: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        log.decoded.append(latent.detach().clone())
        if not goes_on or len(log.decoded) > 1:
            raise _Enough
        try:
            like = output_like(original, (latent, *args), kwargs)
        except Exception as error:  # a VAE that cannot decode as it is, such as one that wants tiling switched on
            raise _Enough from error
        return pytree.tree_map_only(torch.Tensor, lambda each: torch.zeros(each.shape, dtype=each.dtype), like)

    with mock.patch.object(vae, "decode", decode):
        yield
