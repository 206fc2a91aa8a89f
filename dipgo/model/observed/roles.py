"""What each argument of a denoiser's call is, told from how it changes between calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dipgo.base.errors import UsageError
from dipgo.model.observed.template import Condition, Constant, Joined, Latent, Moment, Role, is_latent, same


@dataclass(frozen=True)
class Views:
    """The same call seen under other circumstances, each as flattened arguments.

    Attributes:
        names: of the arguments, as paths.
        steps: of every step of one run.
        passes: of every call in its first step.
        prompt: of another prompt; ``seed``: of another seed; ``scale``: of another guidance scale.
        both: of two images at once; None where the pipeline makes one alone.
        latents: of every step, as the scheduler has them.
    """

    names: Sequence[str]
    steps: Sequence[Sequence[Any]]
    passes: Sequence[Sequence[Any]]
    prompt: Sequence[Any]
    seed: Sequence[Any]
    scale: Sequence[Any]
    both: Sequence[Any] | None
    latents: Sequence[torch.Tensor]


def roles_of(views: Views, rows: int) -> tuple[Role, ...]:
    """Tell what each argument of a call is, from how it changes; ``rows`` are those of the batch for one image.

    Raises:
        UsageError: an argument that is none of these.
    """
    return tuple(_role(views, place, rows) for place in range(len(views.names)))


def _role(views: Views, place: int, rows: int) -> Role:
    name, first = views.names[place], views.steps[0][place]
    values = [step[place] for step in views.steps]
    others = [views.prompt[place], views.scale[place], *(call[place] for call in views.passes)]
    if isinstance(first, torch.Tensor):
        if all(is_latent(value, latent) for value, latent in zip(values, views.latents, strict=True)):
            return Latent()
        if joined := _joined(f"{name}_picture", values, views.latents):
            return joined
        if any(not same(first, value) for value in values):
            if all(value.numel() and bool((value == value.flatten()[0]).all()) for value in values):
                return Moment(tuple(first.shape[1:]))
            raise UsageError(f"it passes '{name}', which changes from step to step")
        if not same(first, views.seed[place]):
            raise UsageError(f"it passes '{name}', which is drawn")
        by_row = first.ndim > 0 and len(first) == rows
        by_row = by_row and (views.both is None or len(views.both[place]) == 2 * rows)
        halves = by_row and rows > 1 and any(not same(first[0], row) for row in first[1:])
        if halves or any(not same(first, other) for other in others):
            if not by_row:
                raise UsageError(f"it passes '{name}' without a row for each image")
            if any(other.shape != first.shape for other in others):
                raise UsageError(f"it passes '{name}', which is as long as the prompt")
            return Condition(name)
        return Constant(first[:1].contiguous() if by_row else first, by_row)
    if any(not same(first, other) for other in (*values, views.seed[place], *others)):
        raise UsageError(f"it passes '{name}', which changes and is no tensor")
    return Constant(first)


def _joined(name: str, values: Sequence[Any], latents: Sequence[torch.Tensor]) -> Joined | None:
    """Return where the latents lie in an argument that holds a condition beside them, the same in every step."""
    shapes = values[0].shape, latents[0].shape
    apart = [k for k in range(1, len(shapes[1])) if shapes[0][k : k + 1] != shapes[1][k : k + 1]]
    if len(shapes[0]) != len(shapes[1]) or len(apart) != 1 or shapes[0][apart[0]] < shapes[1][apart[0]]:
        return None
    axis, length = apart[0], shapes[1][apart[0]]
    for start in (0, shapes[0][axis] - length):
        role = Joined(name, axis, start, length)
        parts = [role.split(value) for value in values]
        if all(is_latent(own, latent) for (own, _), latent in zip(parts, latents, strict=True)) and all(
            same(rest, parts[0][1]) for _, rest in parts
        ):
            return role
    return None
