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
    from dipgo.api import bench as bench
    from dipgo.api import compile as compile
    from dipgo.api import export as export
    from dipgo.api import judge as judge
    from dipgo.api import search as search
    from dipgo.api import verify as verify
    from dipgo.model.models import find_model as find_model
    from dipgo.schedule.subnet import SubNet as SubNet
    from engines.attach.pipeline import attach as attach
    from engines.attach.pipeline import detach as detach
    from engines.pipeline.pipeline import load as load

__version__ = "0.1.0"

_PLACES = {
    **dict.fromkeys(("bench", "compile", "export", "judge", "search", "verify"), "dipgo.api"),
    **dict.fromkeys(("attach", "detach"), "engines.attach.pipeline"),
    "find_model": "dipgo.model.models",
    "load": "engines.pipeline.pipeline",
    "SubNet": "dipgo.schedule.subnet",
}

__all__ = [  # noqa: RUF022 - in the order of use
    "find_model",
    "search",
    "judge",
    "export",
    "compile",
    "verify",
    "bench",
    "load",
    "attach",
    "detach",
    "SubNet",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'dipgo' has no attribute '{name}'")
    from dipgo.base.own_packages import check_packages

    check_packages()
    value = globals()[name] = getattr(import_module(_PLACES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
