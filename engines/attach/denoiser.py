"""The denoiser that stands in a diffusers pipeline while a bundle is attached."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn

from dipgo.base.control import STRENGTH
from dipgo.base.errors import UsageError
from dipgo.model.observed.forms import bound, form_of
from dipgo.model.observed.request import tokens_of
from engines.attach.reading import Call, Reader
from engines.guidance import Guidance, fixed_conditions, is_off
from engines.pipeline.formats import to_array
from engines.program import Program
from engines.steps import Steps

_READ_BY_PIPELINES = ("add_embedding", "in_channels", "out_channels")  # SDXL's checks the inner size of the first
_EXACT = 1e-4  # of a timestep
_ROUNDED = 2.0**-7  # of one in 16 bits, relative


class _Heard(BaseException):
    """Ends a call of a pipeline that was made to hear its first step; some pipelines catch exceptions."""


class AttachedDenoiser(nn.Module):
    """Called like the denoiser that it stands for; answers with the bundle's ε.

    The first call with the first timestep begins a trajectory; each further step must have the next timestep, and the
    same conditions. x is the pipeline's own at every step, so callbacks may change it. Where a pipeline makes each pass
    of guidance a call of its own, the conditions of both are needed at the first: :meth:`hear` gets them.

    Attributes:
        config: of the denoiser that it stands for.
    """

    def __init__(self, program: Program, original: Any, pipe: Any, reader: Reader) -> None:
        super().__init__()
        self.config = original.config
        self.program = program
        self._original = (original,)  # in a tuple it is no submodule: pipe.to() leaves it where it is
        self._pipe = weakref.ref(pipe)
        self._reader = reader
        self._guidance = Guidance()
        self._off = False  # whether the pipeline makes one pass of two
        self._first = 0
        self._hearing = False
        self._heard: list[Call] = []
        self._trajectory: _Trajectory | None = None
        self.register_buffer("_place", torch.empty(0, dtype=original.dtype, device=original.device), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        return self._place.dtype

    @property
    def device(self) -> torch.device:
        return self._place.device

    def cache_context(self, *name: Any, **state: Any) -> Any:
        """Return a context that does nothing: a bundle has no caches of diffusers."""
        return nullcontext()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            original = self.__dict__["_original"][0]
            if name in _READ_BY_PIPELINES:
                return getattr(original, name)
            if hasattr(original, name):
                raise AttributeError(f"'{name}' has no effect on a bundle; call detach(pipe) first") from error
            raise

    @contextmanager
    def hear(self, call: Callable[[], Any]) -> Iterator[None]:
        """Within the context the calls of the first step are known, of the pipeline's ``call``, which is cut short.

        Raises:
            UsageError: the pipeline makes other calls than two per step.
        """
        self._heard, self._hearing = [], True
        try:
            call()
        except _Heard:
            pass
        finally:
            self._hearing = False
        moments = {float(moment) for heard in self._heard for moment in _moments(heard)}
        if len(self._heard) < self.calls or len(moments) > 1:
            scale = self.program.record.sampler.guidance_scale
            raise UsageError(
                f"the pipeline makes one pass per step, the bundle was compiled for guidance {scale:g}, with a "
                "conditional and an unconditional one; ask for guidance, and give a negative_prompt (it may be empty)"
            )
        try:
            yield
        finally:
            self._heard = []

    def begin(self, program: Program, guidance: Guidance, first: int) -> None:
        """Make ready for a call of the pipeline, with its program and its guidance, from a step on."""
        self.end()
        self._off = is_off(program.record, guidance)
        self.program, self._guidance, self._first = program.under(guidance), guidance, first

    @property
    def calls(self) -> int:
        """How often the pipeline calls per step."""
        return 1 if self._off else self._reader.calls

    def end(self) -> None:
        """End the trajectory that is under way, if any; the next call must have the first timestep."""
        if self._trajectory is not None:
            self._trajectory.close()
            self._trajectory = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return ε like the denoiser: a tuple, or an output with ``.sample``, of the shape and dtype that it has.

        Raises:
            UsageError: a timestep out of order, or another latent size, guidance or condition than the bundle's.
        """
        denoiser = getattr(self._original[0], "_orig_mod", self._original[0])
        form = form_of(denoiser)
        arguments = form.read(bound(denoiser, args, kwargs), tokens_of(self._pipe()))
        self._check_guidance()
        call = self._reader.read(arguments, not self._off)
        output = torch.zeros(call.latent.shape) if self._hearing else self._epsilon(call)
        if self._hearing:
            self._heard.append(call)
            if len(self._heard) == self.calls:
                raise _Heard
        rows = len(call.sample)
        output = self._reader.answer(output, rows).to(call.sample.device, call.sample.dtype)
        if form.listed:
            return form.handed_out((output,))
        return Transformer2DModelOutput(sample=output) if arguments.get("return_dict", True) else (output,)

    def _epsilon(self, call: Call) -> torch.Tensor:
        if self._begins(call):
            self.end()
            calls = self._heard or [call]
            if len(calls) < self.calls:
                raise UsageError(
                    "the denoiser is called by itself; a bundle with two calls per step needs a pipeline's"
                )
            self._trajectory = _Trajectory(self.program, calls, self._conditions(calls), self._first)
        assert self._trajectory is not None
        try:
            return torch.from_numpy(self._trajectory.answer(call))
        except BaseException:
            self.end()
            raise

    def _conditions(self, calls: Sequence[Call]) -> dict[str, np.ndarray]:
        """Return the bundle's conditions from the calls of the first step; one pass of two is both of them."""
        passes = 1 + self.program.record.conditioning.guided
        if self._off:
            joined = {name: np.concatenate([value] * passes) for name, value in calls[0].conditions.items()}
        else:
            joined = self._reader.join(calls)
        rows = passes * len(calls[0].latent)
        return fixed_conditions(self.program.record, rows, self._guidance) | joined

    def _check_guidance(self) -> None:
        """Refuse a guidance that was changed on the way."""
        sampler, asked = self.program.record.sampler, self._guidance
        for name, mine in (
            ("guidance_scale", asked.scale if asked.scale is not None else sampler.guidance_scale),
            ("guidance_rescale", asked.rescale if asked.rescale is not None else sampler.guidance_rescale),
        ):
            now = getattr(self._pipe(), f"_{name}", None)
            heeds = name == "guidance_rescale" or (now is not None and self._reader.heeds(now))
            if now is not None and heeds and not abs(now - mine) <= 1e-6:
                raise UsageError(f"{name} = {now}, the call began with {mine}; it cannot change on the way")

    def _begins(self, call: Call) -> bool:
        """Whether a call begins a trajectory; else it is the next of the one under way."""
        moments = {float(value) for value in _moments(call)}
        steps = [step.timestep for step in self.program.record.steps]
        step = self._trajectory.step if self._trajectory else 0
        if len(moments) == 1:
            (moment,) = moments
            if self._trajectory and step < len(steps) and _is_near(moment, steps[step], call):
                return False
            if _is_near(moment, steps[self._first], call):
                return True
        done, after = step - self._first, f"the first, {steps[self._first]}"
        if self._trajectory and done and step < len(steps):
            after = f"timestep {steps[step]} after {done} steps"
        self.end()
        raise UsageError(
            f"the denoiser is called at timestep {', '.join(map(str, sorted(moments)))}, the bundle expects {after}"
        )


def _moments(call: Call) -> np.ndarray:
    return np.unique(to_array(call.timestep))


def _is_near(moment: float, expected: float, call: Call) -> bool:
    """Whether a call's timestep is the expected one, to the precision that it comes in."""
    dtype = getattr(call.timestep, "dtype", None)
    rounded = _ROUNDED * abs(expected) if dtype in (torch.float16, torch.bfloat16) else 0.0
    return abs(moment - expected) <= max(_EXACT, rounded)


class _Trajectory:
    """The images of one call of the pipeline, and how far they are.

    Attributes:
        step: the next one, or the one of whose calls some are to come.
    """

    def __init__(self, program: Program, calls: Sequence[Call], conditions: dict[str, np.ndarray], start: int) -> None:
        self._first, self.step, self._start = list(calls), start, start
        self._rows = len(next(iter(conditions.values()), ()))
        self._number = 0  # of the next call in its step
        self._steps = Steps(program.contexts, calls[0].latent.shape, conditions)
        self._in_graphs = program.record.solver.kind == "graph"
        self._scale = program.bundle.tables["solver.input_scale"]
        self._epsilon = np.empty(0)
        self._steps.__enter__()

    def answer(self, call: Call) -> np.ndarray:
        """Return ε at x scaled, as the denoiser takes it; further calls of a step have that of its first."""
        first = self._first[self._number]
        if call.latent.shape != first.latent.shape:
            raise UsageError(
                f"latents {list(call.latent.shape)} after {list(first.latent.shape)}; a call has one shape of them"
            )
        for name, value in call.conditions.items():
            if name == STRENGTH:
                rows = np.broadcast_to(value[:1], (self._rows, *value.shape[1:]))
                self._steps.set_condition(self.step, name, rows)
            elif not np.array_equal(value, first.conditions[name], equal_nan=value.dtype.kind == "f"):
                raise UsageError(f"'{name}' changed at step {self.step}; a bundle reads conditions once, at the first")
        if self._number == 0:
            self._compute(call.latent)
        self._number = (self._number + 1) % len(self._first)
        self.step += self._number == 0
        return self._epsilon

    def _compute(self, latent: np.ndarray) -> None:
        """Compute the step; graphs with a solver inside scale x themselves."""
        starts = self.step == self._start
        if starts or self._steps.record.steps[self.step].launches:
            self._steps.write(self.step, latent / self._scale[self.step] if self._in_graphs else latent)
        self._steps.start(self.step) if starts else self._steps.launch(self.step)
        self._epsilon = self._steps.epsilon(self.step)

    def close(self) -> None:
        self._steps.__exit__()
