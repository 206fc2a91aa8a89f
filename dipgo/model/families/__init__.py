"""The families of denoisers: how each is called, what conditions it, and which of its modules are sites.

The only place that knows model classes by name. Of a pipeline without an entry it is observed what it does
(:mod:`dipgo.model.families.observed`). To add an entry, add a file here and name it below; for sites alone, a line in
:mod:`dipgo.model.families.sites`.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from dipgo.base.errors import UsageError
from dipgo.model.checks import COMPONENTS
from dipgo.model.families.controlnet import CONTROLNET, controlled_by, nets_of
from dipgo.model.families.dit import DIT
from dipgo.model.families.family import Conditions, Family, Prompting, latent_size
from dipgo.model.families.guided import GuidedDenoiser, join, with_scale_inputs
from dipgo.model.families.observed import family_of_observed, observed_family
from dipgo.model.families.pixart import PIXART_ALPHA, PIXART_SIGMA
from dipgo.model.families.unet import UNET
from dipgo.model.observed.request import Request
from dipgo.model.skeleton import skeleton_of

FAMILIES = (DIT, PIXART_ALPHA, PIXART_SIGMA, UNET, CONTROLNET)
_KNOWN: WeakKeyDictionary[Any, Family] = WeakKeyDictionary()

__all__ = [
    "COMPONENTS",
    "FAMILIES",
    "Conditions",
    "Family",
    "GuidedDenoiser",
    "Prompting",
    "component_of",
    "family_of",
    "join",
    "latent_size",
    "observed_family",
    "registered_family",
    "remember",
    "with_scale_inputs",
]


def registered_family(denoiser_class: str, component: str, pipeline_class: str, nets: int = 0) -> Family | None:
    """Return the registered family of a denoiser and its pipeline, which has ``nets`` ControlNets; None of others."""
    for family in FAMILIES:
        if (family.denoiser_class, family.component) == (denoiser_class, component) and (
            pipeline_class in family.pipelines
        ):
            return controlled_by(nets) if family is CONTROLNET else family
    return None


def family_of(pipe: Any) -> Family:
    """Return the family of a pipeline, by its class or by observation.

    Raises:
        UsageError: see :func:`component_of`; a pipeline whose loop is none that can be made again.
    """
    component = component_of(pipe)
    if pipe in _KNOWN:
        return _KNOWN[pipe]
    denoiser = getattr(pipe, component)
    denoiser = getattr(denoiser, "_orig_mod", denoiser)
    nets = len(nets_of(getattr(pipe, "controlnet", None)))
    family = registered_family(type(denoiser).__name__, component, _loop_of(pipe), nets)
    return remember(pipe, family or family_of_observed(skeleton_of(pipe), component, Request()))


def remember(pipe: Any, family: Family) -> Family:
    """Return ``family``, which :func:`family_of` then has for a pipeline."""
    _KNOWN[pipe] = family
    return family


def _loop_of(pipe: Any) -> str:
    """Return the name of a pipeline's class; of a class of one's own, the nearest that defines the call."""
    return next(kind.__name__ for kind in type(pipe).__mro__ if "__call__" in vars(kind))


def component_of(pipe: Any) -> str:
    """Return the attribute that holds a pipeline's denoiser.

    Raises:
        UsageError: there is none.
    """
    for component in COMPONENTS:
        denoiser = getattr(pipe, component, None)
        denoiser = getattr(denoiser, "_orig_mod", denoiser)  # what torch.compile has inside
        if denoiser is not None:
            return component
    raise UsageError(f"{type(pipe).__name__} holds no denoiser: it has neither {' nor '.join(COMPONENTS)}")
