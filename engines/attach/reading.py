"""What a call of a denoiser says: the latent, the timestep and the conditions, read out of a pipeline's arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any, Protocol

import numpy as np
import torch

from dipgo.base.errors import UsageError
from dipgo.base.guidance import RESCALE, SCALE
from dipgo.model.observed.observation import Observation, joined_conditions
from engines.attach.controlnet import HANDED_ON
from engines.pipeline.formats import to_array
from engines.program import Program
from export.records.graphs import TensorRecord

_PASSED_BESIDES = ("return_dict", "timestep")


@dataclass(frozen=True)
class Call:
    """One call of a denoiser.

    Attributes:
        sample: the latent as it is passed, ``[rows, …]``.
        latent: that of every image, ``[n, …]``, float32.
        timestep: one, or one a row.
        conditions: by the bundle's names, ``[rows, …]``, in the pipeline's own order of passes.
    """

    sample: torch.Tensor
    latent: np.ndarray
    timestep: Any
    conditions: dict[str, np.ndarray]


class Reader(Protocol):
    """How the calls of one kind of pipeline are read, and answered.

    Attributes:
        calls: of the denoiser per step.
    """

    calls: int

    def read(self, arguments: Mapping[str, Any], doubled: bool = True) -> Call:
        """Read a call's arguments, by name; ``doubled`` says whether the pipeline makes both passes of guidance.

        Raises:
            UsageError: what the bundle does not know.
        """

    def join(self, calls: Sequence[Call]) -> dict[str, np.ndarray]:
        """Return the bundle's conditions, the unconditional pass first, from the calls of one step."""

    def answer(self, epsilon: torch.Tensor, rows: int) -> torch.Tensor:
        """Return ε ``[n, …]`` as the denoiser's output of ``rows`` rows."""

    def heeds(self, scale: float) -> bool:
        """Whether a guidance scale of the pipeline's makes a difference."""


def reader_for(program: Program, denoiser: Any, seen: Observation | None) -> Reader:
    """Return the reader of a pipeline's calls, from what it was seen to do, if it is none that is known."""
    return ObservedReader(program, seen) if seen else KnownReader(program, denoiser)


class KnownReader:
    """For pipelines with an entry in :mod:`dipgo.model.families`, which pass a denoiser's arguments by their names."""

    calls = 1

    def __init__(self, program: Program, denoiser: Any) -> None:
        self.program = program
        self._latent_name = list(signature(type(getattr(denoiser, "_orig_mod", denoiser)).forward).parameters)[1]
        self._width = getattr(denoiser.config, "out_channels", None) or 0

    def read(self, arguments: Mapping[str, Any], doubled: bool = True) -> Call:
        sample = arguments[self._latent_name]
        values = to_array(sample)
        record = self.program.record
        _check_latent(self.program, values.shape[1:])
        others = {name: value for name, value in arguments.items() if name != self._latent_name}
        latent = _one_pass(self.program, values, record.conditioning.guided and doubled)
        return Call(sample, latent, arguments["timestep"], self._conditions(others, len(values)))

    def _conditions(self, arguments: Mapping[str, Any], rows: int) -> dict[str, np.ndarray]:
        """Return the bundle's conditions from a call's arguments, and refuse whatever it does not know."""
        names = {tensor.name for tensor in _passed(self.program)}
        flat: dict[str, Any] = {}
        for name, value in arguments.items():
            flat |= value if isinstance(value, Mapping) else {HANDED_ON.get(name, name): value}
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
        return conditions

    def join(self, calls: Sequence[Call]) -> dict[str, np.ndarray]:
        conditions, conditioning = dict(calls[0].conditions), self.program.record.conditioning
        if conditioning.kind == "class" and conditioning.guided:  # DiTPipeline has the unconditional rows last
            labels, null = np.split(conditions[conditioning.inputs[0].name], 2)
            if not (null == conditioning.null_class).all():
                raise UsageError(f"the unconditional class is {null.tolist()}, the bundle's {conditioning.null_class}")
            conditions[conditioning.inputs[0].name] = np.concatenate([null, labels])
        return conditions

    def answer(self, epsilon: torch.Tensor, rows: int) -> torch.Tensor:
        return _padded(_repeated(epsilon, rows), self._width)

    def heeds(self, scale: float) -> bool:
        return self.program.record.conditioning.guided or scale > 1


class ObservedReader:
    """For pipelines that were observed: the template of their calls says what each argument is."""

    def __init__(self, program: Program, seen: Observation) -> None:
        self.program, self.seen = program, seen
        self.calls = seen.guide.record.calls

    def read(self, arguments: Mapping[str, Any], doubled: bool = True) -> Call:
        template, batched = self.seen.template, self.seen.guide.batched and doubled
        sample = template.latent(arguments)
        _check_latent(self.program, sample.shape[1:])
        conditions = {name: to_array(value) for name, value in template.conditions(arguments).items()}
        for tensor in _passed(self.program):
            value = conditions[tensor.name]
            if len(sample) > len(value) == 1:  # one negative prompt for all images, as in Qwen-Image
                value = conditions[tensor.name] = value.repeat(len(sample), 0)
            if list(value.shape) != [len(sample), *tensor.shape[1:]]:
                raise UsageError(
                    f"'{tensor.name}' is {list(value.shape)} for {len(sample)} rows, the bundle takes "
                    f"{list(tensor.shape[1:])} a row"
                )
        return Call(sample, _one_pass(self.program, to_array(sample), batched), template.moment(arguments), conditions)

    def join(self, calls: Sequence[Call]) -> dict[str, np.ndarray]:
        tensors = [{name: torch.from_numpy(value) for name, value in call.conditions.items()} for call in calls]
        return {name: value.numpy() for name, value in joined_conditions(self.seen, tensors).items()}

    def answer(self, epsilon: torch.Tensor, rows: int) -> torch.Tensor:
        return _padded(_repeated(self.seen.guide.sign * epsilon, rows), self.seen.width)

    def heeds(self, scale: float) -> bool:
        return self.seen.embeds or self.seen.guide.passes > 1


def _passed(program: Program) -> list[TensorRecord]:
    """Return the conditions that pipelines pass to their denoiser: guidance they keep to themselves."""
    return [tensor for tensor in program.record.conditioning.inputs if tensor.name not in (SCALE, RESCALE)]


def _check_latent(program: Program, image: Sequence[int]) -> None:
    """Refuse a latent of one image of another shape than the bundle's, or outside of its ranges."""
    record = program.record
    mine = record.latent.shape[1:]
    if record.pixels:
        if list(image) != mine:
            height, width = record.pixels
            raise UsageError(
                f"the latent of an image is {list(image)}, the bundle's {mine}; give height = {height} and width = "
                f"{width}"
            )
        return
    if image[0] != mine[0]:
        raise UsageError(f"the latent has {image[0]} channels, the bundle's {mine[0]}")
    program.latent_shape(1, (image[-2] * record.cell, image[-1] * record.cell))


def _one_pass(program: Program, sample: np.ndarray, guided: bool) -> np.ndarray:
    """Return x of every image; with both passes of guidance in one call, which get the same, that of the first."""
    if not guided:
        return sample
    count = len(sample) // 2
    if len(sample) % 2 or not np.array_equal(sample[:count], sample[count:], equal_nan=True):
        raise UsageError(
            f"the denoiser is called without guidance, on {len(sample)} images; the bundle was compiled for "
            f"guidance_scale = {program.record.sampler.guidance_scale}"
        )
    return sample[:count]


def _repeated(epsilon: torch.Tensor, rows: int) -> torch.Tensor:
    return epsilon.repeat(rows // len(epsilon), *[1] * (epsilon.ndim - 1))


def _padded(epsilon: torch.Tensor, width: int) -> torch.Tensor:
    """Fill up the first axis after the batch with zeros: a learned variance, which pipelines drop."""
    missing = width - epsilon.shape[1]
    if missing <= 0:
        return epsilon
    return torch.cat([epsilon, epsilon.new_zeros(len(epsilon), missing, *epsilon.shape[2:])], dim=1)
