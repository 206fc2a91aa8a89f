"""Search which blocks of a diffusion model to skip, compile what is left, prove it, measure it.

    import dipgo

    subnet = dipgo.search("digits-dit", steps=20, budget=0.35)
    dipgo.export(subnet, "bundle")
    pipe = dipgo.load("bundle")  # called like the diffusers pipeline that it came from
    images = pipe(class_labels=[3, 1, 4, 1, 5], generator=0).images

Everything is imported when it is first used, so that ``import dipgo`` takes no time and needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dipgo.api import attach as attach
    from dipgo.api import detach as detach
    from dipgo.api import load as load

__version__ = "0.1.0"

__all__ = ["__version__", "attach", "detach", "load"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'dipgo' has no attribute '{name}'")
    return getattr(import_module("dipgo.api"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
