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
        self._signature = inspect.signature(type(getattr(original, "_orig_mod", original)).forward)
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
        missing = (getattr(self.config, "out_channels", None) or epsilon.shape[1]) - epsilon.shape[1]
        if missing > 0:  # a learned variance, which pipelines drop
            epsilon = torch.cat([epsilon, epsilon.new_zeros(len(epsilon), missing, *epsilon.shape[2:])], dim=1)
        return Transformer2DModelOutput(sample=epsilon) if arguments.get("return_dict", True) else (epsilon,)

    def _latent(self, sample: np.ndarray) -> np.ndarray:
        """Return x of every image; with guidance, where both passes get the same, that of the first."""
        record = self.program.record
        channels, height, width = sample.shape[1:]
        if channels != record.latent.shape[1]:
            raise UsageError(f"the latent has {channels} channels, the bundle's {record.latent.shape[1]}")
        self.program.latent_shape(1, (height * record.cell, width * record.cell))
        scale = getattr(self._pipe(), "_guidance_scale", None)
        mine = record.sampler.guidance_scale
        if scale is not None and abs(scale - mine) > 1e-6 and (record.conditioning.guided or scale > 1):
            raise UsageError(
                f"guidance_scale = {scale}, the bundle was compiled for {mine}; it cannot change on the way"
            )
        rescale = getattr(self._pipe(), "_guidance_rescale", 0.0)
        own = record.sampler.guidance_rescale
        if not abs(rescale - own) <= 1e-6:
            raise UsageError(f"guidance_rescale = {rescale}, the bundle's is {own}; it cannot change on the way")
        if not record.conditioning.guided:
            return sample
        count = len(sample) // 2
        if len(sample) % 2 or not np.array_equal(sample[:count], sample[count:], equal_nan=True):
            raise UsageError(
                f"the denoiser is called without guidance, on {len(sample)} images; the bundle was compiled for "
                f"guidance_scale = {mine}"
            )
        return sample[:count]

    def _conditions(self, arguments: Mapping[str, Any], rows: int) -> dict[str, np.ndarray]:
        """Return the bundle's conditions from a call's arguments, and refuse whatever it does not know."""
        conditioning = self.program.record.conditioning
        names = {tensor.name for tensor in conditioning.inputs}
        flat: dict[str, Any] = {}
        for name, value in arguments.items():
            flat |= value if isinstance(value, Mapping) else {name: value}
        conditions = {
            name: to_array(value) for name, value in flat.items() if value is not None and name not in _PASSED_BESIDES
        }
        for name in conditions.keys() ^ names:
            verb = "passes" if name in conditions else "does not pass"
            raise UsageError(
                f"the pipeline {verb} '{name}' to its denoiser; the bundle takes {', '.join(sorted(names))}"
            )
        for name, value in conditions.items():
            if len(value) != rows:
                raise UsageError(f"'{name}' has {len(value)} rows, the latent {rows}; the bundle takes one per row")
        if conditioning.kind == "class" and conditioning.guided:  # DiTPipeline has the unconditional rows last
            labels, null = np.split(conditions[conditioning.inputs[0].name], 2)
            if not (null == conditioning.null_class).all():
                raise UsageError(f"the unconditional class is {null.tolist()}, the bundle's {conditioning.null_class}")
            conditions[conditioning.inputs[0].name] = np.concatenate([null, labels])
        return conditions

    def _step(self, timestep: Any) -> int:
        moments = {float(value) for value in np.ravel(to_array(timestep))}
        steps = [step.timestep for step in self.program.record.steps]
        step = self._trajectory.step if self._trajectory else 0
        if len(moments) == 1:
            (moment,) = moments
            if self._trajectory and step < len(steps) and abs(moment - steps[step]) <= 1e-4:
                return step
            if abs(moment - steps[0]) <= 1e-4:
                return 0
        after = f"timestep {steps[step]} after {step} steps" if 0 < step < len(steps) else f"the first, {steps[0]}"
        self.end()
        raise UsageError(
            f"the denoiser is called at timestep {', '.join(map(str, sorted(moments)))}, the bundle expects {after}"
        )


class _Trajectory:
    """The images of one call of the pipeline, and how far they are."""

    def __init__(self, program: Pipeline, shape: Sequence[int], conditions: dict[str, np.ndarray]) -> None:
        self._shape, self._conditions, self.step = tuple(shape), conditions, 0
        self._steps = Steps(program.contexts, shape, conditions)
        self._in_graphs = program.record.solver.kind == "graph"
        self._scale = program.bundle.tables["solver.input_scale"]
        self._steps.__enter__()

    def advance(self, latent: np.ndarray, conditions: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return ε at x scaled, as the denoiser takes it; graphs with a solver inside scale it themselves."""
        if latent.shape != self._shape:
            raise UsageError(f"latents {list(latent.shape)} after {list(self._shape)}; a call has one shape of them")
        for name, value in conditions.items():
            if not np.array_equal(value, self._conditions[name], equal_nan=value.dtype.kind == "f"):
                raise UsageError(f"'{name}' changed at step {self.step}; a bundle reads conditions once, at the first")
        if self._steps.record.steps[self.step].launches:
            self._steps.write(self.step, latent / self._scale[self.step] if self._in_graphs else latent)
        self._steps.launch(self.step)
        self.step += 1
        return self._steps.epsilon(self.step - 1)

    def close(self) -> None:
        self._steps.__exit__()
