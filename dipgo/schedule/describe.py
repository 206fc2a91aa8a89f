"""SubNets as text; without torch."""

from __future__ import annotations

import numpy as np

from dipgo.schedule.subnet import SubNet


def subnet_text(subnet: SubNet) -> str:
    """Identity, cost and gate map of a SubNet: a row per site, a column per step; █ computed, · served."""
    cost, sampler = subnet.cost, subnet.sampler
    signatures = len(np.unique(subnet.gates, axis=0))
    empty = int((~subnet.gates.any(axis=1)).sum())
    schedule = subnet.schedule
    served = f"the last {schedule.history} outputs, weighted" if schedule.learned else "the last output"
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
