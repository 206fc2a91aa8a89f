"""DeepCache (Ma et al., CVPR 2024): the settings of its helper, or of its older pipelines, as JSON.

DeepCache computes a UNet in full at some steps; at the others it enters the network at one layer of the way up, with
the feature that arrived there last time, and computes only what lies behind and beside it. So one feature is kept.
As a SubNet: the module that hands out this feature is skipped, and what only it reads falls away by itself.

- The helper: ``{"cache_interval": 3, "cache_branch_id": 0}``. Branch b enters at layer b mod 3 of block b // 3, both
  counted from the output; each step whose number the interval divides is full. The parameters that it stores,
  ``cache_block_id`` and ``cache_layer_id`` beside ``skip_mode``, are read too.
- The pipelines: ``{"cache_interval": 5, "cache_layer_id": 0, "cache_block_id": 0, "uniform": false, "pow": 1.4,
  "center": 15}``. Here ``cache_layer_id`` is the block and ``cache_block_id`` the layer before the one of entry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dipgo.importers.published import Published

if TYPE_CHECKING:
    from torch import nn

    from dipgo.graph.trace import Trace

_MOST = 10_000  # steps, branches: no model has so many
_LAYERS = 3  # of a block, as DeepCache numbers branches, whatever the model
_KEYS = {
    *("cache_interval", "cache_branch_id", "cache_layer_id", "cache_block_id"),
    *("skip_mode", "uniform", "pow", "center"),
}


@dataclass(frozen=True)
class DeepCache(Published):
    """How many steps lie between full ones, and where the others enter.

    Attributes:
        interval: one step in so many is full.
        branch: where the others enter, as the helper numbers it.
        curve: (power, center) of the non-uniform schedule; None for the uniform one.
    """

    interval: int
    branch: int
    curve: tuple[float, int] | None
    format = "DeepCache"

    def sites(self, denoiser: nn.Module) -> str:
        return _same_features(denoiser, self.branch)[0]

    def columns(
        self, names: Sequence[str], denoiser: nn.Module, timesteps: Sequence[float]
    ) -> Mapping[str, np.ndarray]:
        order = list(timesteps)
        numbers = [order.index(timestep) for timestep in timesteps]  # as DeepCache: PNDM's second call is the first
        full = full_steps(len(timesteps), self.interval, self.curve)
        same = _same_features(denoiser, self.branch)
        site = next((name for name in same if name in names), same[0])
        return {site: np.isin(numbers, full)}

    def record(self, trace: Trace, gates: np.ndarray) -> dict[str, Any]:
        return {"cache_interval": self.interval, "cache_branch_id": self.branch, "curve": self.curve}


def full_steps(steps: int, interval: int, curve: tuple[float, int] | None) -> list[int]:
    """Return the steps that are computed in full.

    Uniform: those that the interval divides. Non-uniform, for ⌈steps / interval⌉ of them: points at equal distances
    from ``(-center)^(1/p)`` to ``(steps - center)^(1/p)``, raised to p and cut to whole numbers, without the ends, and
    step 0. DeepCache takes the roots of negative numbers for complex ones and keeps real parts; p is lowered by 0.02
    until the points are distinct.

    Raises:
        ValueError: no power above 1 gives distinct points.
    """
    if curve is None or interval == 1:
        return list(range(0, steps, interval))
    power, center = curve
    count = -(-steps // interval)
    while power > 1:
        first, last = (end ** (1 / power) for end in (-center, steps - center))  # complex where the end is negative
        points = np.real(np.linspace(first, last, count + 1) ** power)
        inner = np.unique(np.trunc(points).astype(int))[1:-1] + center
        if len(inner) + 1 == count:
            return sorted({0, *inner.tolist()})
        power -= 0.02
    raise ValueError(f"no schedule of {count} steps out of {steps} with pow {curve[0]:g} and center {center}")


def _same_features(denoiser: nn.Module, branch: int) -> list[str]:
    """Return the module whose output DeepCache keeps, and others with the same output."""
    ups: Any = getattr(denoiser, "up_blocks", None)
    if ups is None:
        raise ValueError(f"DeepCache is for UNets, and {type(denoiser).__name__} is none; give another --model")
    depth, layer = divmod(branch, _LAYERS)
    if depth >= len(ups):
        raise ValueError(f"branch {branch} lies in block {depth}, but the UNet has {len(ups)}")
    block = len(ups) - 1 - depth
    before = len(ups[block].resnets) - 2 - layer  # the layer that hands its output to the one of entry
    if before >= 0:
        return [_last_of_layer(ups, block, before)]
    if block == 0:
        return ["mid_block"]
    inner = len(ups[block - 1].resnets) - 1
    sampler = f"up_blocks.{block - 1}.upsamplers.0"
    return [f"up_blocks.{block - 1}", sampler if ups[block - 1].upsamplers else _last_of_layer(ups, block - 1, inner)]


def _last_of_layer(ups: Any, block: int, layer: int) -> str:
    kind = "attentions" if getattr(ups[block], "attentions", None) else "resnets"
    return f"up_blocks.{block}.{kind}.{layer}"


def read_deepcache(document: Any) -> DeepCache | None:
    """Read settings; None where the document is something else.

    Raises:
        ValueError: settings that DeepCache does not have, or that mean two things.
    """
    if not isinstance(document, dict) or "cache_interval" not in document:
        return None
    unknown = sorted(document.keys() - _KEYS)
    if unknown:
        raise ValueError(f"DeepCache has no setting '{unknown[0]}'; known: {', '.join(sorted(_KEYS))}")
    if document.get("skip_mode", "uniform") != "uniform":
        raise ValueError(f"skip_mode {document['skip_mode']!r} is unknown; DeepCache's helper has only 'uniform'")
    return DeepCache(_whole(document, "cache_interval", 1), _branch(document), _curve(document))


def _branch(document: Mapping[str, Any]) -> int:
    apart = {"cache_layer_id", "cache_block_id"} & document.keys()
    if not apart:
        return _whole(document, "cache_branch_id", 0)
    if "cache_branch_id" in document or ("skip_mode" in document) == ("uniform" in document):
        raise ValueError(
            "cache_layer_id and cache_block_id mean one thing in DeepCache's helper (beside skip_mode) and the "
            "opposite in its pipelines (beside uniform); give cache_branch_id instead"
        )
    layer_id, block_id = _whole(document, "cache_layer_id", 0), _whole(document, "cache_block_id", 0)
    return _LAYERS * block_id + layer_id if "skip_mode" in document else _LAYERS * layer_id + block_id + 1


def _curve(document: Mapping[str, Any]) -> tuple[float, int] | None:
    curve = {"pow", "center"} & document.keys()
    if document.get("uniform", True):
        if curve:
            raise ValueError(f"'{min(curve)}' has no effect unless uniform is false; leave it out, or say so")
        return None
    power = document.get("pow")
    if isinstance(power, bool) or not isinstance(power, int | float) or not 1 < power < 100:
        raise ValueError("a schedule that is not uniform needs 'pow', a number above 1, and 'center', a step")
    return float(power), _whole(document, "center", 0)


def _whole(document: Mapping[str, Any], name: str, least: int) -> int:
    value = document.get(name, 0)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _MOST:
        raise ValueError(f"{name} is {str(value)[:40]}, expected a whole number from {least} to {_MOST}")
    return value
