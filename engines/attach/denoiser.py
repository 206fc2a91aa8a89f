"""The denoiser that stands in a diffusers pipeline while a bundle is attached."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn

from dipgo.base.errors import UsageError
from engines.pipeline.formats import to_array
from engines.pipeline.pipeline import Pipeline
from engines.steps import Steps

_READ_BY_PIPELINES = ("add_embedding",)  # SDXL's checks its inner size
_PASSED_BESIDES = ("self", "return_dict", "timestep")


class AttachedDenoiser(nn.Module):
    """Called like the denoiser that it stands for; answers with the bundle's ε.

    The call with the first timestep begins a trajectory; each further one must have the next timestep, and the same
    conditions. x is the pipeline's own at every step, so callbacks may change it.

    Attributes:
        config: of the denoiser that it stands for.
    """

    def __init__(self, program: Pipeline, original: Any, pipe: Any) -> None:
        super().__init__()
        self.config = original.config
        self.program = program
        self._original = (original,)  # in a tuple it is no submodule: pipe.to() leaves it where it is
        self._pipe = weakref.ref(pipe)
        self._signature = inspect.signature(type(original).forward)
        self._latent_name = list(self._signature.parameters)[1]
        self._trajectory: _Trajectory | None = None
        self.register_buffer("_place", torch.empty(0, dtype=original.dtype, device=original.device), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        return self._place.dtype

    @property
    def device(self) -> torch.device:
        return self._place.device

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
        arguments = dict(self._signature.bind(self, *args, **kwargs).arguments)
        sample = arguments.pop(self._latent_name)
        latent = self._latent(to_array(sample))
        conditions = self._conditions(arguments, len(sample))
        step = self._step(arguments["timestep"])
        if step == 0:
            self.end()
            self._trajectory = _Trajectory(self.program, latent.shape, conditions)
        assert self._trajectory is not None
        try:
            epsilon = torch.from_numpy(self._trajectory.advance(latent, conditions))
        except BaseException:
            self.end()
            raise
        epsilon = epsilon.repeat(len(sample) // len(latent), 1, 1, 1).to(sample.device, sample.dtype)
        further = (getattr(self.config, "out_channels", None) or epsilon.shape[1]) - epsilon.shape[1]
        if further > 0:  # a learned variance, which pipelines drop
            epsilon = torch.cat([epsilon, epsilon.new_zeros(len(epsilon), further, *epsilon.shape[2:])], dim=1)
        return Transformer2DModelOutput(sample=epsilon) if arguments.get("return_dict", True) else (epsilon,)

    def _latent(self, sample: np.ndarray) -> np.ndarray:
        """Return x of every image; of the two halves of guidance, which are equal, the first."""
        record = self.program.record
        channels, height, width = sample.shape[1:]
        if channels != record.latent.shape[1]:
            raise UsageError(f"the latent has {channels} channels, the bundle's {record.latent.shape[1]}")
        self.program.latent_shape(1, (height * record.cell, width * record.cell))
        scale = getattr(self._pipe(), "_guidance_scale", None)
        asked = record.sampler.guidance_scale
        if scale is not None and abs(scale - asked) > 1e-6 and (record.conditioning.guided or scale > 1):
            raise UsageError(
                f"guidance_scale = {scale}, the bundle was compiled for {asked}; it cannot change on the way"
            )
        if not record.conditioning.guided:
            return sample
        half = len(sample) // 2
        if len(sample) % 2 or not np.array_equal(sample[:half], sample[half:], equal_nan=True):
            raise UsageError(
                f"the denoiser is called without guidance, on {len(sample)} images; the bundle was compiled for "
                f"guidance_scale = {asked}"
            )
        return sample[:half]

    def _conditions(self, arguments: Mapping[str, Any], rows: int) -> dict[str, np.ndarray]:
        """Return the bundle's conditions from a call's arguments, and refuse whatever it does not know."""
        conditioning = self.program.record.conditioning
        wanted = {tensor.name for tensor in conditioning.inputs}
        flat: dict[str, Any] = {}
        for name, value in arguments.items():
            flat |= value if isinstance(value, Mapping) else {name: value}
        given = {name: value for name, value in flat.items() if value is not None and name not in _PASSED_BESIDES}
        for name in given.keys() ^ wanted:
            verb = "passes" if name in given else "does not pass"
            raise UsageError(
                f"the pipeline {verb} '{name}' to its denoiser; the bundle takes {', '.join(sorted(wanted))}"
            )
        found = {name: to_array(value) for name, value in given.items()}
        for name, value in found.items():
            if len(value) != rows:
                raise UsageError(f"'{name}' has {len(value)} rows, the latent {rows}; the bundle takes one a row")
        if conditioning.kind == "class" and conditioning.guided:  # DiTPipeline has the unconditional half last
            labels, null = np.split(found[conditioning.inputs[0].name], 2)
            if not (null == conditioning.null_class).all():
                raise UsageError(f"the unconditional class is {null.tolist()}, the bundle's {conditioning.null_class}")
            found[conditioning.inputs[0].name] = np.concatenate([null, labels])
        return found

    def _step(self, timestep: Any) -> int:
        moments = {float(value) for value in np.ravel(to_array(timestep))}
        steps = [step.timestep for step in self.program.record.steps]
        done = self._trajectory.done if self._trajectory else 0
        if len(moments) == 1:
            (moment,) = moments
            if self._trajectory and done < len(steps) and abs(moment - steps[done]) <= 1e-4:
                return done
            if abs(moment - steps[0]) <= 1e-4:
                return 0
        found = ", ".join(map(str, sorted(moments)))
        after = f"timestep {steps[done]} after {done} steps" if 0 < done < len(steps) else f"the first, {steps[0]}"
        self.end()
        raise UsageError(f"the denoiser is called at timestep {found}, the bundle expects {after}")


class _Trajectory:
    """The images of one call of the pipeline, and how far they are."""

    def __init__(self, program: Pipeline, shape: Sequence[int], conditions: dict[str, np.ndarray]) -> None:
        self._shape, self._conditions, self.done = tuple(shape), conditions, 0
        self._steps = Steps(program.lanes, shape, conditions)
        self._in_graphs = program.record.solver.kind == "graph"
        self._scale = program.bundle.tables["solver.input_scale"]
        self._steps.__enter__()

    def advance(self, latent: np.ndarray, conditions: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return ε at x as the denoiser is given it, scaled; graphs with a solver inside scale it themselves."""
        if latent.shape != self._shape:
            raise UsageError(f"latents {list(latent.shape)} after {list(self._shape)}; a call has one shape of them")
        for name, value in conditions.items():
            if not np.array_equal(value, self._conditions[name], equal_nan=value.dtype.kind == "f"):
                raise UsageError(f"'{name}' changed at step {self.done}; a bundle reads conditions once, at the first")
        if self._steps.record.steps[self.done].launches:
            self._steps.write(self.done, latent / self._scale[self.done] if self._in_graphs else latent)
        self._steps.launch(self.done)
        self.done += 1
        return self._steps.epsilon(self.done - 1)

    def close(self) -> None:
        self._steps.__exit__(None, None, None)
