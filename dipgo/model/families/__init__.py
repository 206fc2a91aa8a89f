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
from dipgo.model.families.pixart import PIXART
from dipgo.model.families.unet import UNET

FAMILIES = (DIT, PIXART, UNET)
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
    """Return the registered family of a class of denoiser, or one made from the class itself.

    Raises:
        UsageError: an unregistered class whose inputs cannot be guessed.
    """
    for family in FAMILIES:
        if (family.denoiser_class, family.component) == (denoiser_class, component):
            return family
    return generic_family(denoiser_class, component, config, pipeline_class)


def family_of(pipe: Any) -> Family:
    """Return the family of a pipeline's denoiser.

    Raises:
        UsageError: the pipeline holds no denoiser, or one whose inputs cannot be guessed.
    """
    for component in COMPONENTS:
        denoiser = getattr(pipe, component, None)
        if denoiser is not None:
            return family_for(type(denoiser).__name__, component, denoiser.config, type(pipe).__name__)
    raise UsageError(f"{type(pipe).__name__} holds no denoiser: it has neither {' nor '.join(COMPONENTS)}")
