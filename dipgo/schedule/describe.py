"""Models and SubNets as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dipgo.schedule.subnet import SubNet

if TYPE_CHECKING:  # a SubNet is described without torch
    from dipgo.model.models import Model


def model_text(model: Model) -> str:
    """One line on a model: class, parameters, MACs of a call, sites by granularity."""
    from dipgo.graph.sites import site_names
    from dipgo.graph.trace import call_macs

    denoiser = model.empty_denoiser()
    parameters = sum(parameter.numel() for parameter in denoiser.parameters())
    sites = {spec: len(site_names(denoiser, model.family, spec)) for spec in model.family.sites}
    counts = ", ".join(f"{count} {spec}" for spec, count in sites.items())
    return (
        f"{model.name}: {model.family.denoiser_class}, {parameters / 1e6:.2f} M parameters, "
        f"{call_macs(model, denoiser) / 1e9:.3f} G MACs a call, sites: {counts or 'by pattern'}"
    )


def families_text() -> str:
    """The supported classes of denoisers, with their site patterns."""
    from dipgo.model.families import FAMILIES

    lines = ["denoisers with sites of their own, from a diffusers folder or a hub id (granularity: site patterns):"]
    for family in FAMILIES:
        lines.append(f"  {family.denoiser_class}")
        lines += [f"    {spec}: {', '.join(patterns)}" for spec, patterns in family.sites.items()]
    lines.append(
        "  any other class of diffusers that is called on a latent, a timestep and at most text embeddings: --sites "
        "PATTERN,…"
    )
    return "\n".join(lines)


def subnet_text(subnet: SubNet) -> str:
    """Identity, cost and gate map of a SubNet: a row a site, a column a step; █ computed, · served from its backup."""
    cost, sampler = subnet.cost, subnet.sampler
    signatures = len(np.unique(subnet.gates, axis=0))
    empty = int((~subnet.gates.any(axis=1)).sum())
    served = f"the last {subnet.terms} outputs, weighted" if subnet.weights else "the last output"
    width = max(len(site.name) for site in subnet.sites)
    total = sum(site.macs for site in subnet.sites)
    rows = [
        f"{site.name:<{width}}  {''.join('█' if gate else '·' for gate in subnet.gates[:, index])}  "
        f"{subnet.gates[:, index].sum():>3}/{subnet.calls}  {site.macs / max(total, 1):6.2%} of sites' MACs"
        for index, site in enumerate(subnet.sites)
    ]
    return "\n".join(
        [
            f"model      {subnet.model.name} ({subnet.model.class_name})",
            f"sampler    {sampler.class_name}, {sampler.steps} steps, guidance {sampler.guidance_scale:g}",
            f"MACs       {cost.subnet / 1e9:.3f} G of {cost.full / 1e9:.3f} G kept: {cost.ratio:.2%}",
            f"gates      {subnet.gates.sum()} of {subnet.gates.size} computed, {signatures} signatures, "
            f"{empty} steps compute no site; a skipped site serves {served}",
            "",
            *rows,
        ]
    )
