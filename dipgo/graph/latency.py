"""Latency as the cost of a search: measured time a site, in the place of MACs.

A profile is measured from an engine on one machine (``benchmarks/latency.py``). It gives the costs of a traced
graph, as the trace itself gives MACs.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from dipgo.base.errors import DipgoError
from dipgo.base.records import ModelIdentity, Record, read_json, validated
from dipgo.graph.costs import Costs

if TYPE_CHECKING:  # a profile is read without torch
    from dipgo.graph.trace import Trace

SCHEMA = "dipgo.latency/1"
GIVE = "one that was searched with --cost latency, or measure with --cost latency"


class SiteLatency(Record):
    """Time that goes when a site is skipped and everything it reads is still computed."""

    name: str
    nanoseconds: int = Field(ge=0)


class LatencyProfile(Record):
    """Time of one call of the denoiser for one image, by site; ``base`` is what no site holds."""

    schema_id: Literal["dipgo.latency/1"] = Field(alias="schema", default="dipgo.latency/1")
    model: ModelIdentity
    engine: str
    machine: str
    guidance_scale: float
    base_nanoseconds: int = Field(ge=0)
    sites: list[SiteLatency]

    def costs(self, trace: Trace) -> Costs:
        """Return costs in nanoseconds: each site's at its output, the base at ε.

        Raises:
            DipgoError: a profile of other sites, or of another model.
        """
        if [site.name for site in self.sites] != [site.name for site in trace.sites]:
            raise DipgoError("the latency profile is of other sites than this search's; measure it again")
        identity = trace.model.identity()
        if (self.model.config_sha256, self.guidance_scale > 1) != (identity.config_sha256, trace.guidance_scale > 1):
            raise DipgoError(f"the latency profile is of another model ({self.model.name}); measure it again")
        nodes = {outputs[0]: site.nanoseconds for outputs, site in zip(trace.outputs, self.sites, strict=True)}
        nodes[trace.epsilon] = nodes.get(trace.epsilon, 0) + self.base_nanoseconds
        return Costs(trace, "ns", nodes)


def read_profile(path: Path) -> LatencyProfile:
    """Read a profile, of a file of its own or of a SubNet that was searched with one.

    Raises:
        DipgoError: a file that is missing, damaged, or of a SubNet that was searched by MACs.
    """
    raw = read_json(path, "latency profile")
    if isinstance(raw, dict) and isinstance(raw.get("search"), dict):  # a SubNet
        cost = raw["search"].get("cost")
        raw = cost.get("profile") if isinstance(cost, dict) else None
        if raw is None:
            raise DipgoError(f"{path}: this SubNet was searched by MACs, so it holds no latency profile; give {GIVE}")
    return check_profile(raw, path)


def check_profile(raw: Any, path: Path) -> LatencyProfile:
    """Return what was read from ``path`` as a profile; DipgoError where it is none."""
    return validated(raw, path, LatencyProfile, SCHEMA, f"give {GIVE}")
