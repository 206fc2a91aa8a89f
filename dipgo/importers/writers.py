"""Schedules as other tools take them: what ``dipgo convert`` writes.

Only *when* something is computed goes out. What a tool serves instead is its own: learned backups stay here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dipgo.base.errors import DipgoError, UsageError
from dipgo.importers.deepcache import DeepCache
from dipgo.importers.importer import schedule_of
from dipgo.schedule.subnet import SubNet

_DPCACHE = "sglang-dpcache-schedule-v2"


def whole_steps(subnet: SubNet, tool: str) -> np.ndarray:
    """Return which calls of the denoiser are computed, bool ``[calls]``, of a schedule that skips whole steps.

    Raises:
        DipgoError: a step that computes some of the sites.
    """
    gates = subnet.gates
    partial = np.flatnonzero(gates.any(axis=1) & ~gates.all(axis=1))
    if len(partial):
        step = int(partial[0])
        raise DipgoError(
            f"step {step} computes {gates[step].sum()} of {gates.shape[1]} sites, and {tool} knows whole steps alone"
        )
    return np.asarray(gates.all(axis=1))


def cache_dit(subnet: SubNet) -> dict[str, Any]:
    """Return the arguments of cache-dit's ``DBCacheConfig`` that a schedule of whole steps is; it counts calls.

    Raises:
        DipgoError: a schedule that skips less than steps.
    """
    mask = whole_steps(subnet, "cache-dit")
    return {
        "num_inference_steps": len(mask),
        "steps_computation_mask": mask.astype(int).tolist(),
        "steps_computation_policy": "static",
    }


def sglang_dpcache(subnet: SubNet, like: Mapping[str, Any]) -> dict[str, Any]:
    """Return SGLang's DPCache schedule of whole steps.

    Args:
        subnet: the first two steps are to be computed, since two are extrapolated.
        like: a schedule that the server planned for the same request, at any budget; its ``request`` names what the
            server checks (pipeline, checkpoint, attention backend, sizes, timesteps).

    Raises:
        DipgoError: a schedule that cannot be said so, or a request for other steps.
        UsageError: ``like`` is no such schedule.
    """
    mask = whole_steps(subnet, "DPCache")
    if len(mask) != subnet.sampler.steps:
        raise DipgoError(
            f"{subnet.sampler.class_name} makes {len(mask)} calls in {subnet.sampler.steps} steps, and DPCache has one "
            "entry per step; search with a sampler that makes one call per step"
        )
    request = like["request"] if isinstance(like.get("request"), dict) else {}
    if like.get("schema") != _DPCACHE or not isinstance(request.get("timesteps"), list):
        raise UsageError(f"--like is to be a schedule that SGLang planned, of schema {_DPCACHE}")
    if request.get("num_inference_steps") != len(mask):
        raise DipgoError(f"the SubNet has {len(mask)} steps, and --like {request.get('num_inference_steps')}")
    theirs = np.array(request["timesteps"], float)
    mine = np.array(subnet.sampler.timesteps, float)
    scale = mine[0] / theirs[0] if theirs.size and theirs[0] else 1.0  # either of t and t / 1000 may be passed
    if theirs.shape != mine.shape or not np.allclose(theirs * scale, mine, rtol=1e-3):
        raise DipgoError("the SubNet's timesteps are not those of --like: plan it for the same size and scheduler")
    full = np.flatnonzero(mask).tolist()
    lead = int(np.argmin(mask)) if not mask.all() else len(mask)
    if lead < 2:
        raise DipgoError("step 1 is skipped, and DPCache computes the first two; search again, or add it to the gates")
    return {
        **like,
        "full_steps": full,
        "num_full_steps": len(full),
        "mandatory_full_steps": list(range(min(lead, 3))),
        "force_last_full": bool(mask[-1]),
        "max_gap": None,
        "calibrated_cost": 0.0,
        "calibration": {"manifest_sha256": "0" * 64, "num_samples": 0},
        "source_commit": "dipgo",
    }


def deepcache(subnet: SubNet, model: str | None = None) -> dict[str, Any]:
    """Return the settings of ``DeepCacheSDHelper`` under which the model computes what the schedule says.

    The model's structure is traced; ``model`` is where it lies, if elsewhere than the SubNet's name says.

    Raises:
        DipgoError: no interval and branch give this schedule.
    """
    from dipgo.graph.trace import trace
    from dipgo.model.models import find_model

    full = np.flatnonzero(subnet.gates.all(axis=1))
    interval = int(full[1]) if len(full) > 1 else subnet.calls
    own = find_model(model or subnet.model.name).at(subnet.sampler.guidance)
    denoiser = own.empty_denoiser()
    ups: Any = getattr(denoiser, "up_blocks", None)
    if ups is None:
        raise DipgoError(f"DeepCache is for UNets, and {type(denoiser).__name__} is none")
    traced = trace(own, ",".join(site.name for site in subnet.sites), subnet.sampler.guidance)
    for branch in range(3 * len(ups)):
        try:
            same = schedule_of(DeepCache(interval, branch, None), traced, subnet.sampler.timesteps, denoiser)
        except (ValueError, UsageError):
            continue  # its module is no site of this SubNet
        if np.array_equal(same.gates, subnet.gates):
            return {"cache_interval": interval, "cache_branch_id": branch}
    raise DipgoError(
        "DeepCache computes every n-th step in full and enters at one branch at the others; this schedule does not"
    )
