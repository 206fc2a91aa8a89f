"""Callbacks after every step, as diffusers calls them: they see x and may stop the call, but not change it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dipgo.base.errors import UsageError
from engines.later import LaterWalk
from engines.pipeline.formats import to_array
from engines.steps import Walk

TENSORS = ("latents",)

Callback = Callable[[Any, int, Any, dict[str, Any]], Mapping[str, Any] | None]


@dataclass(frozen=True)
class StepCallback:
    """A callback of diffusers and what it is shown.

    Attributes:
        function: called with the pipeline, the step, its timestep and the tensors by name.
        pipe: the pipeline.
        tensors: names of tensors: ``latents``, or none.
        convert: turns an array into what the caller takes for a tensor.

    Raises:
        UsageError: another name.
    """

    function: Callback
    pipe: Any
    tensors: Sequence[str]
    convert: Callable[[np.ndarray], Any]

    def __post_init__(self) -> None:
        other = next((name for name in self.tensors if name not in TENSORS), None)
        if other:
            raise UsageError(f"callbacks of a bundle are shown latents, not '{other}'; use attach() for all others")

    def __call__(self, walk: Walk | LaterWalk) -> None:
        """Call it after a step.

        Raises:
            UsageError: it changed x.
        """
        step = walk.step - 1
        timestep = walk.steps.record.steps[step].timestep
        latent = walk.latent
        moment = int(timestep) if timestep == int(timestep) else timestep
        tensor = self.convert(latent.copy())
        tensors = {"latents": tensor} if "latents" in self.tensors else {}
        answer = self.function(self.pipe, step - walk.first, moment, tensors) or {}
        changes = [name for name, value in answer.items() if name != "latents" or value is not tensor]
        if changes or not np.array_equal(to_array(tensor), latent, equal_nan=True):
            raise UsageError(
                f"the callback changed {changes[0] if changes else 'latents'} at step {step}; a bundle's "
                "solver is compiled and takes no changes, use attach() on a diffusers pipeline"
            )
