"""A call of the denoiser as its pipeline makes it, with places for the latent, the timestep and the conditions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from dipgo.base.errors import UsageError

_SAME = 1e-5  # relative, of latents that went through a scheduler's own arithmetic


@dataclass(frozen=True)
class Latent:
    """The place of the latent."""


@dataclass(frozen=True)
class Moment:
    """The place of the timestep, ``[rows]``, or the same for each of several frames, ``[rows, frames]``."""

    frames: tuple[int, ...] = ()

    def spread(self, timestep: torch.Tensor) -> torch.Tensor:
        return timestep.reshape(-1, *[1] * len(self.frames)).expand(-1, *self.frames) if self.frames else timestep


@dataclass(frozen=True)
class Condition:
    """The place of a condition, ``[rows, …]``."""

    name: str


@dataclass(frozen=True)
class Joined:
    """The place of the latent with a condition beside it, along an axis: that of a picture, in channels or tokens.

    ``start`` is where the latent begins, ``length`` how long it is there.
    """

    name: str
    axis: int
    start: int
    length: int

    def join(self, latent: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        return torch.cat([latent, condition] if not self.start else [condition, latent], dim=self.axis)

    def split(self, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the latent and the condition."""
        latent = value.narrow(self.axis, self.start, self.length)
        rest = value.shape[self.axis] - self.length
        return latent, value.narrow(self.axis, 0 if self.start else self.length, rest)


@dataclass(frozen=True)
class Constant:
    """What is the same in every call; a tensor with a row for each of the batch is kept as one row."""

    value: Any
    by_row: bool = False


Role = Latent | Joined | Moment | Condition | Constant


@dataclass(frozen=True)
class Template:
    """The arguments of a call, flattened, and what each is."""

    tree: pytree.TreeSpec
    roles: tuple[Role, ...]

    def arguments(
        self, latent: torch.Tensor, timestep: torch.Tensor, conditions: Mapping[str, torch.Tensor]
    ) -> dict[str, Any]:
        """Return the keyword arguments of a call on ``[rows, …]`` of each."""

        def of(role: Role) -> Any:
            if isinstance(role, Latent):
                return latent
            if isinstance(role, Moment):
                return role.spread(timestep)
            if isinstance(role, Condition):
                return conditions[role.name]
            if isinstance(role, Joined):
                return role.join(latent, conditions[role.name].to(latent.dtype))
            value = role.value
            if not isinstance(value, torch.Tensor):
                return value
            value = value.to(latent.device, latent.dtype if value.is_floating_point() else value.dtype)
            rows = latent.shape[0]  # len() would fix it; some classes view their arguments
            return value.expand(rows, *value.shape[1:]).contiguous() if role.by_row else value

        return pytree.tree_unflatten([of(role) for role in self.roles], self.tree)

    def latent(self, arguments: Mapping[str, Any]) -> torch.Tensor:
        """Return the latent in the arguments of a call."""
        pairs = zip(self.roles, self._leaves(arguments), strict=True)
        return next(
            leaf if isinstance(role, Latent) else role.split(leaf)[0]
            for role, leaf in pairs
            if isinstance(role, Latent | Joined)
        )

    def moment(self, arguments: Mapping[str, Any]) -> torch.Tensor | None:
        """Return the timestep in the arguments of a call; None where it takes none."""
        return self._first(Moment, arguments)

    def _first(self, kind: type[Role], arguments: Mapping[str, Any]) -> Any:
        leaves = self._leaves(arguments)
        return next((leaf for role, leaf in zip(self.roles, leaves, strict=True) if isinstance(role, kind)), None)

    def _leaves(self, arguments: Mapping[str, Any]) -> list[Any]:
        leaves, tree = pytree.tree_flatten(dict(arguments))
        if tree != self.tree:
            raise UsageError("the pipeline calls its denoiser with other arguments for these prompts; not supported")
        return leaves

    def conditions(self, arguments: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Return the conditions in the arguments of a call.

        Raises:
            UsageError: arguments of another structure than those that were observed, or other constants.
        """
        conditions = {}
        for name, role, leaf in zip(names_of(arguments), self.roles, self._leaves(arguments), strict=True):
            if isinstance(role, Condition):
                conditions[role.name] = leaf
            elif isinstance(role, Joined):
                conditions[role.name] = role.split(leaf)[1]
            elif isinstance(role, Constant) and not _is_constant(leaf, role):
                raise UsageError(
                    f"the pipeline passes another '{name}' for these prompts than for others; not supported"
                )
        return conditions


def is_latent(value: Any, latent: torch.Tensor) -> bool:
    """Whether each row of an argument is the latent ``[1, …]``, or a multiple of it."""
    if not isinstance(value, torch.Tensor) or value.shape[1:] != latent.shape[1:] or not value.is_floating_point():
        return False
    wide = latent.double().flatten()
    for row in value.double().flatten(1):
        factor = torch.dot(row, wide) / torch.dot(wide, wide)
        if not torch.linalg.norm(row - factor * wide) <= _SAME * torch.linalg.norm(row) or not row.any():
            return False
    return True


def _is_constant(leaf: Any, role: Constant) -> bool:
    """Whether an argument is a constant as it was observed, to the precision that it comes in."""
    value = role.value
    if not isinstance(value, torch.Tensor) or not isinstance(leaf, torch.Tensor):
        return same(leaf, value)
    if role.by_row:
        value = value.expand(len(leaf), *value.shape[1:])
    if leaf.shape != value.shape:
        return False
    return (
        torch.allclose(leaf.cpu().float(), value.float(), rtol=2.0**-7)
        if leaf.is_floating_point()
        else same(leaf.cpu(), value)
    )


def same(one: Any, other: Any) -> bool:
    """Whether two arguments are equal; tensors in shape and values."""
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return type(one) is type(other) and one.shape == other.shape and torch.equal(one, other)
    try:
        return bool(one == other)
    except Exception:  # arrays and other things that compare by element
        return one is other


def names_of(arguments: Mapping[str, Any]) -> list[str]:
    """Return a name for each flattened argument: the last word of its path, or the path where others have the same."""
    paths = [path for path, _ in pytree.tree_flatten_with_path(dict(arguments))[0]]
    words = [[str(getattr(key, "key", getattr(key, "idx", key))) for key in path] for path in paths]
    last = [next((word for word in reversed(path) if not word.isdecimal()), path[-1]) for path in words]
    return [word if last.count(word) == 1 else ".".join(path) for word, path in zip(last, words, strict=True)]
