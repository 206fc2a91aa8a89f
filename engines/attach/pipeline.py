"""A bundle in the place of the denoiser of a diffusers pipeline, whose own scheduler, callbacks and VAE run on.

:func:`attach` checks that the pipeline is the one that the bundle was compiled from; every call is checked before it
starts, and every call of the denoiser as it comes.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dipgo.base.errors import UsageError
from engines.backends import DEFAULT
from engines.guidance import Guidance
from engines.pipeline.arguments import check_scheduler
from engines.pipeline.pictures import start_of, start_record
from engines.pipeline.pipeline import Pipeline, load
from engines.program import Program

if TYPE_CHECKING:
    from dipgo.model.observed.observation import Observation

_ATTACHMENT = "_dipgo_attachment"


@dataclass
class Attachment:
    """A bundle in the place of a pipeline's denoiser; a context that yields the pipeline and detaches the bundle.

    Attributes:
        pipe: the diffusers pipeline.
        program: the bundle's program.
        component: attribute of the pipeline that the denoiser is.
        original: the denoiser that was there.
        controlnet: the ControlNet that was there, whose place is taken too; None where there is none.
        seen: what the pipeline was seen to do; None of one that is known.
        of_pictures: whether the pipeline starts from pictures.
        budget: of the program that calls get; None leaves it to the bundle.
    """

    pipe: Any
    program: Pipeline
    component: str
    original: Any
    controlnet: Any
    seen: Observation | None
    of_pictures: bool
    budget: float | None
    owns: bool
    calling: threading.Lock

    @property
    def originals(self) -> dict[str, Any]:
        """The modules that were there, by their attributes of the pipeline."""
        own = {self.component: self.original}
        return own if self.controlnet is None else own | {"controlnet": self.controlnet}

    def __enter__(self) -> Any:
        return self.pipe

    def __exit__(self, *error: object) -> None:
        if self.pipe.__dict__.get(_ATTACHMENT) is self:
            detach(self.pipe)


def attach(
    pipe: Any,
    bundle: str | Path | Pipeline,
    backend: str = DEFAULT,
    threads: int | None = None,
    device: str | None = None,
    budget: float | None = None,
) -> Attachment:
    """Put a bundle in the place of a diffusers pipeline's denoiser.

    The pipeline is then called as ever: with the bundle's step count and size. Guidance is inside the graphs, so the
    denoiser returns guided ε for the unconditional and the conditional pass, which the pipeline's own guidance leaves
    as it is. Any number of images goes in one call, a context for every batch of the bundle. The
    denoiser that was there stays in memory for :func:`detach`.

    A pipeline without an entry is observed first. Where it makes both passes calls of their own, it encodes prompts
    twice: the bundle needs both at the first. Pipelines that start from pictures need a bundle of ``export --image``.

    Args:
        pipe: a diffusers pipeline, on any device; one call at a time.
        bundle: folder of the bundle, or a loaded one, which may serve several pipelines at once.
        backend, threads, device: as in :func:`engines.pipeline.pipeline.load`, for a folder.
        budget: of the program that calls get, where the bundle holds several; steps are as each call says.

    Raises:
        UsageError: another pipeline class, denoiser, configuration, weights or scheduler than the bundle's, naming
            both; a denoiser that was changed (hooks, FreeU, adapters, …); a pipeline that has a bundle attached, or
            that cannot be observed.
        DipgoError: a damaged bundle.
    """
    from dipgo.model.checks import check_pipeline_class
    from dipgo.model.families import component_of, family_of
    from dipgo.model.families.controlnet import nets_of
    from dipgo.model.families.pictures import without_pictures
    from engines.attach.check import check_denoiser
    from engines.attach.controlnet import handing_on
    from engines.attach.denoiser import AttachedDenoiser
    from engines.attach.reading import reader_for

    if _ATTACHMENT in pipe.__dict__:
        raise UsageError(f"{type(pipe).__name__} has a bundle attached already; call detach(pipe) first")
    program = bundle if isinstance(bundle, Pipeline) else load(bundle, threads, backend, device)
    record = program.record
    plain = without_pictures(pipe)
    check_pipeline_class(type(plain).__name__)
    if plain is not pipe:
        start_record(program, type(pipe).__name__)
    component = component_of(pipe)
    original = getattr(pipe, component)
    denoiser = getattr(original, "_orig_mod", original)  # torch.compile's own is around it
    controlnet = getattr(pipe, "controlnet", None)
    family = family_of(plain)
    parts = (denoiser, *nets_of(controlnet)) if controlnet is not None and family.whole else ()
    check_denoiser(program.bundle, family.denoiser(pipe) if parts else denoiser, parts)
    check_scheduler(record, pipe.scheduler)
    if record.steps[0].timestep == record.steps[1].timestep:
        raise UsageError(f"{record.sampler.class_name} begins with one timestep twice; attach() takes no such sampler")
    seen = family.at(record.sampler.guidance, record.sampler.pixels).seen
    if seen and seen.guide.passes > 2:
        raise UsageError(f"{type(pipe).__name__} makes {seen.guide.passes} passes per step; attach() takes one or two")
    owns = program is not bundle
    told = (plain is not pipe, budget, owns)
    attachment = Attachment(pipe, program, component, original, controlnet, seen, *told, threading.Lock())
    program.__enter__()
    setattr(pipe, component, AttachedDenoiser(program, original, pipe, reader_for(program, original, seen)))
    if controlnet is not None:
        pipe.controlnet = handing_on(controlnet)
    kind: Any = type(pipe)
    pipe.__class__ = _checking_class(kind)
    pipe.__dict__[_ATTACHMENT] = attachment
    return attachment


def detach(pipe: Any) -> None:
    """Give a pipeline its own denoiser back, and drop the engines that :func:`attach` loaded.

    Raises:
        UsageError: no bundle is attached.
    """
    attachment = pipe.__dict__.pop(_ATTACHMENT, None)
    if attachment is None:
        raise UsageError(f"{type(pipe).__name__} has no bundle attached")
    pipe.__class__ = type(pipe).__mro__[1]
    getattr(pipe, attachment.component).end()
    for name, module in attachment.originals.items():
        setattr(pipe, name, module)
    if attachment.owns:
        attachment.program.close()


@functools.cache
def _checking_class(kind: Any) -> Any:
    """Return a class of pipeline whose calls are checked against the bundle that is attached.

    Guidance and step count are the pipeline's own business and never reach its denoiser: only here are they seen.
    """
    call = kind.__call__
    signature = inspect.signature(call)

    @functools.wraps(call)
    def check_and_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        attachment = self.__dict__[_ATTACHMENT]
        with _one_call(attachment):
            program = attachment.program.at(bound.arguments.get("num_inference_steps"), attachment.budget)
            guidance = _check_call(attachment, program, bound)
            denoiser = getattr(self, attachment.component)
            denoiser.begin(program, guidance, _first_call(attachment, program, bound))
            try:
                with _heard(attachment, call, bound):
                    return call(self, *args, **kwargs)
            finally:
                denoiser.end()

    @functools.wraps(kind.save_pretrained)
    def save(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Save the denoiser that was there: the bundle's own is no module with weights."""
        attachment = self.__dict__[_ATTACHMENT]
        attached = {name: getattr(self, name) for name in attachment.originals}
        for name, module in attachment.originals.items():
            setattr(self, name, module)
        self.__class__ = kind
        try:
            return self.save_pretrained(*args, **kwargs)
        finally:
            self.__class__ = _checking_class(kind)
            for name, module in attached.items():
                setattr(self, name, module)

    def components(self: Any) -> dict[str, Any]:
        """Return the components with the denoiser that was there: pipelines made of them have no bundle attached."""
        return kind.components.fget(self) | self.__dict__[_ATTACHMENT].originals

    members = {
        "__call__": check_and_call,
        "save_pretrained": save,
        "components": property(components),
        "__module__": kind.__module__,
        "__doc__": kind.__doc__,
    }
    return type(kind.__name__, (kind,), members)


@contextmanager
def _one_call(attachment: Attachment) -> Iterator[None]:
    if not attachment.calling.acquire(blocking=False):
        raise UsageError(
            "the pipeline is in a call already; attach a pipeline of its own to the bundle for each thread"
        )
    try:
        yield
    finally:
        attachment.calling.release()


def _check_call(attachment: Attachment, program: Program, bound: inspect.BoundArguments) -> Guidance:
    """Check a call before it starts; returns its guidance."""
    from dipgo.model.observed.request import guidance_argument
    from engines.attach.request import check_known, check_observed, guidance_of

    check_scheduler(program.record, attachment.pipe.scheduler)
    if attachment.seen is None:
        check_known(program, bound.arguments)
        return guidance_of(bound.arguments)
    guidance = guidance_argument(attachment.pipe, attachment.component)
    check_observed(program, attachment.seen, guidance, bound)
    return guidance_of(bound.arguments, guidance)


def _first_call(attachment: Attachment, program: Program, bound: inspect.BoundArguments) -> int:
    """Return the call of the denoiser that a pipeline starts at: from a picture, by its strength."""
    return start_of(program, bound.arguments["strength"]) if attachment.of_pictures else 0


def _heard(
    attachment: Attachment, call: Callable[..., Any], bound: inspect.BoundArguments
) -> AbstractContextManager[None]:
    """Return a context in which the denoiser knows the conditions of both passes, where these are two calls."""
    pipe = attachment.pipe
    if getattr(pipe, attachment.component).calls == 1:
        return nullcontext()
    quiet = inspect.BoundArguments(bound.signature, {**bound.arguments, "callback_on_step_end": None})

    def first_step() -> None:
        bar = getattr(pipe, "_progress_bar_config", {})
        pipe.set_progress_bar_config(**bar | {"disable": True})
        try:
            with _generators_as_they_were(bound.arguments.get("generator")):
                call(*quiet.args, **quiet.kwargs)
        finally:
            pipe.set_progress_bar_config(**bar)

    hearing: AbstractContextManager[None] = getattr(pipe, attachment.component).hear(first_step)
    return hearing


@contextmanager
def _generators_as_they_were(given: Any) -> Iterator[None]:
    """Restore afterwards what torch's own generators, and those that a call was given, were at."""
    import torch

    generators = given if isinstance(given, list | tuple) else [] if given is None else [given]
    states = [generator.get_state() for generator in generators]
    try:
        with torch.random.fork_rng():
            yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
