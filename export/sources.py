"""What programs are compiled from: SubNets, their samplers, and the model traced and converted for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from dipgo.base.errors import DipgoError, UsageError
from dipgo.base.records import Passes
from dipgo.graph.trace import Trace, trace
from dipgo.model.models import Model
from dipgo.model.sampler import Sampler
from dipgo.model.starts import Starts, starts_of
from dipgo.schedule.schedule import Schedule
from dipgo.schedule.subnet import SubNet
from export.converted import Prepared


@dataclass(frozen=True)
class Source:
    """What a program is compiled from."""

    prepared: Prepared
    subnet: SubNet
    sampler: Sampler

    @property
    def starts(self) -> Starts:
        """How the sampler goes on from later starts."""
        return starts_of(scheduler_of(self.subnet), self.sampler)

    def checked(self) -> Source:
        """Return the source with its SubNet in canonical form, after checking that its parts fit together.

        Raises:
            DipgoError: a mismatch of model, sampler or sites.
        """
        traced, subnet, sampler = self.prepared.trace, self.subnet, self.sampler
        check_model(subnet, traced.model)
        if [site.name for site in subnet.sites] != [site.name for site in traced.sites]:
            raise DipgoError("the SubNet's sites are not those that were traced; search again")
        if [float(t) for t in subnet.sampler.timesteps] != list(sampler.timesteps):
            raise DipgoError(
                f"the SubNet's {len(subnet.sampler.timesteps)} timesteps are not those of {sampler.steps} steps of "
                f"{sampler.name}, which has {sampler.calls}; search again"
            )
        return replace(self, subnet=normalise(subnet, traced))


def check_unguided(model: Model, subnet: SubNet) -> None:
    """Refuse a SubNet that a program of the conditional pass alone cannot be made of.

    Raises:
        UsageError: it was searched without guidance, or the pipeline makes further passes, or guides at 1 too.
    """
    scale = subnet.sampler.guidance
    family = model.at(scale, subnet.sampler.pixels).family
    if family.perturbs or not family.guides(scale) or model.at(1.0, subnet.sampler.pixels).family.guides(1.0):
        raise UsageError(
            f"--unguided: '{model.name}' makes no fewer passes at guidance 1 than at {scale:g}; leave it out"
        )


def without_guidance(source: Source, alone: Prepared) -> Source:
    """Return what a program of the conditional pass alone is compiled from; ``alone`` was traced with that pass."""
    schedule, subnet, traced = source.subnet.schedule, source.subnet, alone.trace
    backups = {name: each[:, :, 1] if each.ndim == 4 else each for name, each in schedule.backups.items()}
    sampler = replace(source.sampler, passes=Passes())
    own = replace(subnet, sampler=sampler.identity(1.0), sites=traced.sites)
    return Source(alone, own.under(Schedule(schedule.gates, backups), traced), sampler)


def retrace(model: Model, subnet: SubNet, dtype: torch.dtype = torch.float32, open_guidance: bool = False) -> Trace:
    """Trace ``model`` with the SubNet's sites and guidance; all else as :func:`dipgo.graph.trace.trace` has it."""
    return trace(model, sites_of(subnet), subnet.sampler.guidance, dtype, open_guidance=open_guidance)


def check_model(subnet: SubNet, model: Model) -> None:
    """Refuse a SubNet that was searched on another model.

    Raises:
        DipgoError: class, configuration or weights differ.
    """
    identity = model.identity()
    for what, mine, theirs in (
        ("class", subnet.model.class_name, identity.class_name),
        ("configuration", subnet.model.config_sha256, identity.config_sha256),
        ("weights", subnet.model.weights_sha256, identity.weights_sha256),
    ):
        if mine is not None and mine != theirs:
            raise DipgoError(
                f"the SubNet belongs to '{subnet.model.name}': its {what} ({mine[:32]}) is not that of "
                f"'{identity.name}' ({str(theirs)[:32]}); give the right --model, or search again"
            )


def check_together(subnets: Sequence[SubNet]) -> None:
    """Refuse SubNets that cannot be programs of one bundle.

    Raises:
        UsageError: of other image sizes, with another number of passes of guidance, or alike in steps and budget.
    """
    first, seen = subnets[0], list[tuple[int, float]]()
    for number, subnet in enumerate(subnets, 1):
        sampler, which = subnet.sampler, f"SubNet {number} of {len(subnets)}"
        if sampler.pixels != first.sampler.pixels:
            raise UsageError(f"{which} is for images of another size than the first; export it on its own")
        passes = [each.guidance_scale > 1 for each in (first.sampler, sampler)]
        if passes[0] != passes[1] or (sampler.guidance_rescale > 0) != (first.sampler.guidance_rescale > 0):
            raise UsageError(
                f"{which} has other passes of guidance, or another rescale, than the first; export it on its own"
            )
        if any(steps == sampler.steps and abs(ratio - subnet.cost.ratio) < 0.005 for steps, ratio in seen):
            raise UsageError(
                f"{which} has the steps and the budget of one before it ({sampler.steps}, {subnet.cost.ratio:.1%}), "
                "and requests could not tell them apart; leave it out"
            )
        seen.append((sampler.steps, subnet.cost.ratio))


def normalise(subnet: SubNet, traced: Trace) -> SubNet:
    """Return the canonical form: dead gates off, weights of missing outputs zero, cost as the graph has it."""
    return subnet.under(subnet.schedule.canonical(traced), traced)


def sampler_of(subnet: SubNet, model: Model) -> Sampler:
    """Return the sampler that a SubNet was searched for, as a table."""
    return model.at(subnet.sampler.guidance, subnet.sampler.pixels).family.table(
        scheduler_of(subnet), subnet.sampler.steps
    )


def scheduler_of(subnet: SubNet) -> Any:
    """Return the diffusers scheduler that a SubNet was searched for."""
    import diffusers

    scheduler_class = getattr(diffusers, subnet.sampler.class_name, None)
    if scheduler_class is None:
        raise DipgoError(
            f"the installed diffusers has no {subnet.sampler.class_name}; install the version it came from"
        )
    try:
        return scheduler_class.from_config(subnet.sampler.config)
    except Exception as error:  # whatever a constructor says of its arguments
        raise DipgoError(
            f"the SubNet's {subnet.sampler.class_name} cannot be made of its configuration ({error}); search again"
        ) from error


def sites_of(subnet: SubNet) -> str:
    """Return the site spec that traces exactly a SubNet's sites."""
    return ",".join(site.name for site in subnet.sites)
