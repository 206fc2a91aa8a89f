"""The families of denoisers: how each is called, what conditions it, and which of its modules are sites.

The only place that knows model classes by name. A class without an entry gets a family made from the signature of its
``forward`` (:mod:`dipgo.model.families.generic`), and sites by pattern. To add an entry, add a file here and name it
below.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dipgo.base.errors import UsageError
from dipgo.model.families.dit import DIT
from dipgo.model.families.family import Conditions, Family, Prompting, latent_size
from dipgo.model.families.generic import generic_family
from dipgo.model.families.guided import GuidedDenoiser, default_guidance, join
from dipgo.model.families.pixart import PIXART_ALPHA, PIXART_SIGMA
from dipgo.model.families.unet import UNET

FAMILIES = (DIT, PIXART_ALPHA, PIXART_SIGMA, UNET)
COMPONENTS = ("transformer", "unet")  # the attributes under which diffusers pipelines hold their denoisers

__all__ = [
    "COMPONENTS",
    "FAMILIES",
    "Conditions",
    "Family",
    "GuidedDenoiser",
    "Prompting",
    "default_guidance",
    "family_for",
    "family_of",
    "join",
    "latent_size",
]


def family_for(denoiser_class: str, component: str, config: Mapping[str, Any], pipeline_class: str) -> Family:
    """Return the registered family of a denoiser and its pipeline, or one made from the class of denoiser itself.

    Raises:
        UsageError: a pipeline whose loop is none of those that are reproduced, or an unregistered class of denoiser
            whose inputs cannot be guessed.
    """
    registered = [each for each in FAMILIES if (each.denoiser_class, each.component) == (denoiser_class, component)]
    for family in registered:
        if pipeline_class in family.pipelines:
            return family
    if registered:
        names = ", ".join(name for family in registered for name in family.pipelines)
        raise UsageError(
            f"{pipeline_class} samples in a way of its own, which is not supported; with a {denoiser_class} these are: "
            f"{names} (load the model by one of them and save that, if its images are what you want)"
        )
    return generic_family(denoiser_class, component, config, pipeline_class)


def family_of(pipe: Any) -> Family:
    """Return the family of a pipeline; of a class of one's own, the nearest that defines the call counts.

    Raises:
        UsageError: the pipeline holds no denoiser, or see :func:`family_for`.
    """
    loop = next(kind for kind in type(pipe).__mro__ if "__call__" in vars(kind))
    for component in COMPONENTS:
        denoiser = getattr(pipe, component, None)
        denoiser = getattr(denoiser, "_orig_mod", denoiser)  # what torch.compile has inside
        if denoiser is not None:
            return family_for(type(denoiser).__name__, component, denoiser.config, loop.__name__)
    raise UsageError(f"{type(pipe).__name__} holds no denoiser: it has neither {' nor '.join(COMPONENTS)}")
