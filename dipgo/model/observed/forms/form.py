"""What a form is: how a class of denoiser is called, in the place of its own ``forward``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad

from dipgo.base.errors import UsageError

Arguments = dict[str, Any]


def own_forward(denoiser: nn.Module, **arguments: Any) -> Any:
    return type(denoiser).forward(denoiser, **arguments)


def as_they_are(arguments: Arguments, tokens: int) -> Arguments:
    return arguments


@dataclass(frozen=True)
class Form:
    """How a class of denoiser is called.

    Attributes:
        read: ``(arguments as a pipeline passes them, tokens of every text) -> arguments of forward``; what is read
            already stays as it is.
        forward: ``(denoiser, **arguments) -> outputs``.
        listed: whether pipelines get the first output as a list of images, ``[1, C, 1, H, W]`` without its batch.
    """

    read: Callable[[Arguments, int], Arguments] = as_they_are
    forward: Callable[..., Any] = own_forward
    listed: bool = False

    def first(self, output: Any) -> torch.Tensor:
        """Return the first output of a call that a pipeline made."""
        return torch.stack(output[0]).squeeze(2) if self.listed else output[0]

    def handed_out(self, output: Any) -> Any:
        """Return the outputs of :attr:`forward` as a pipeline gets them."""
        return (list(output[0].unsqueeze(2).unbind()),)


def bound(denoiser: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Arguments:
    """Return the arguments of a call by name; those of a form may be others than the class's own."""
    parameters = signature(type(denoiser).forward)
    others = {name: value for name, value in kwargs.items() if name not in parameters.parameters}
    own = {name: value for name, value in kwargs.items() if name not in others}
    arguments = dict(parameters.bind_partial(denoiser, *args, **own).arguments)
    del arguments["self"]
    return arguments | others


def padded(text: torch.Tensor, mask: torch.Tensor | None, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return text ``[rows, n, width]`` padded with zeros to ``[rows, tokens, width]``, and a mask ``[rows, tokens]``.

    Raises:
        UsageError: text that is longer.
    """
    more = tokens - text.shape[1]
    if more < 0:
        raise UsageError(f"a prompt of {text.shape[1]} tokens; at most {tokens} are supported")
    mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device) if mask is None else mask.bool()
    return pad(text, (0, 0, 0, more)), pad(mask, (0, more))
