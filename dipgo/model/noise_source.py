"""Where diffusers draws noise: ``randn_tensor``, which each module of pipelines and schedulers has by that name."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch


@contextmanager
def drawing(kind: type, draw: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Draw noise by ``draw(randn_tensor, *its arguments)`` in the modules of a class and of those it inherits from."""
    with ExitStack() as stack:
        for module in {sys.modules[each.__module__] for each in kind.__mro__}:
            original = vars(module).get("randn_tensor")
            if original is not None:
                stack.enter_context(mock.patch.object(module, "randn_tensor", functools.partial(draw, original)))
        yield
