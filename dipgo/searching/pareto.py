"""What a sweep over budgets found, as one picture and one table: quality against compute."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dipgo.base.files import new_file
from dipgo.schedule.subnet import SubNet


def points(subnets: Sequence[SubNet]) -> list[dict[str, Any]]:
    """Return for each SubNet its share of MACs, and what the judge gave it and the best fixed schedule, in dB."""
    listed = []
    for subnet in subnets:
        search = subnet.search
        point: dict[str, Any] = {"macs_ratio": subnet.cost.ratio, "psnr_db": search.psnr_db}
        point |= {"chosen": search.chosen, "seconds": search.seconds}
        if search.best_policy is not None:
            best = search.best_policy
            point |= {"best_policy": best, "best_policy_psnr_db": search.held_out_psnr_db[best]}
        listed.append(point)
    return listed


def write_pareto(subnets: Sequence[SubNet], folder: Path) -> None:
    """Write ``pareto.json`` and ``pareto.png`` into ``folder``."""
    import matplotlib.figure

    listed = sorted(points(subnets), key=lambda point: point["macs_ratio"])
    with new_file(folder / "pareto.json") as draft:
        draft.write_text(json.dumps(listed, indent=2) + "\n")
    figure = matplotlib.figure.Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    shares = [point["macs_ratio"] for point in listed]
    axes.plot(shares, [point["psnr_db"] for point in listed], "o-", label=subnets[0].search.method)
    if all("best_policy" in point for point in listed):
        axes.plot(shares, [point["best_policy_psnr_db"] for point in listed], "s--", label="best fixed schedule")
    sampler = subnets[0].sampler
    axes.set(
        xlabel="share of the full trajectory's MACs",
        ylabel="PSNR to the full trajectory, dB",
        title=f"{subnets[0].model.name}, {sampler.steps} steps, guidance {sampler.guidance_scale:g}",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    with new_file(folder / "pareto.png") as draft:
        figure.savefig(draft, dpi=120)
