"""What is seen of a pipeline that is watched: calls of its denoiser, steps of its scheduler, noise that it draws."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Call:
    """A call of the denoiser: its arguments by name, its first output, and the number of its step.

    ``processors`` are those of its attention, by module, that its pipeline put there.
    """

    arguments: dict[str, Any]
    output: Any
    step: int
    processors: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """A step of the scheduler: what it was given, and the latent that it returned."""

    output: torch.Tensor
    timestep: Any
    latent: torch.Tensor
    options: dict[str, Any]
    result: torch.Tensor


@dataclass
class Log:
    """What was seen.

    Attributes:
        settings: the arguments of ``set_timesteps``, by name.
        begin: the step that the scheduler was told to begin at, if it was.
        scaled: what ``scale_model_input`` returned, by step; empty where it was not called.
        drawn: the noise that the pipeline drew, in order.
        drawn_in_steps: the noise that its scheduler drew.
        decoded: what the VAE was given.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    begin: int | None = None
    calls: list[Call] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    scaled: list[torch.Tensor] = field(default_factory=list)
    drawn: list[torch.Tensor] = field(default_factory=list)
    drawn_in_steps: list[torch.Tensor] = field(default_factory=list)
    decoded: list[torch.Tensor] = field(default_factory=list)

    def calls_of(self, step: int) -> list[Call]:
        return [call for call in self.calls if call.step == step]


def first_of(output: Any) -> Any:
    """Return the first output of a network, of a tuple or of an output class of diffusers."""
    return output[0]


def plain(value: Any) -> Any:
    """Return a copy of nested values whose tensors are their own."""
    return pytree.tree_map(
        lambda leaf: leaf.detach().clone() if isinstance(leaf, torch.Tensor) else _copied(leaf), value
    )


def _copied(leaf: Any) -> Any:
    try:
        return copy.deepcopy(leaf)
    except Exception:  # handles and modules, which are the same in every call
        return leaf
