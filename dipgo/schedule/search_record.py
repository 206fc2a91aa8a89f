"""What a SubNet says of where it comes from: the search, the import or the rule that made its schedule."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from dipgo.base.records import Count, Record
from dipgo.graph.costs import Costs
from dipgo.graph.latency import LatencyProfile
from dipgo.schedule.schedule import Schedule


class Cost(Record):
    """Multiply-accumulates of one trajectory at batch 1, attention products included: all gates 1, and as gated."""

    kind: Literal["macs"] = "macs"
    full: int = Field(gt=0, lt=2**63)
    subnet: Count
    ratio: float = Field(ge=0, allow_inf_nan=False)

    @classmethod
    def of(cls, schedule: Schedule, costs: Costs) -> Cost:
        """Return the record of a canonical schedule; ``costs`` are MACs."""
        return cls(full=costs.full * schedule.calls, subnet=schedule.cost(costs), ratio=schedule.share(costs))


class Note(BaseModel):
    """A frozen piece of a record in which nothing is required: only what is set is written, and extra keys are kept."""

    model_config = ConfigDict(extra="allow", frozen=True)

    @model_serializer(mode="wrap")
    def _what_is_set(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if name in self.model_fields_set}


class BudgetKind(Note):
    """What the budget was a share of; for latency the profile, and the share that is kept by it."""

    kind: str = "macs"
    ratio: float | None = None
    profile: LatencyProfile | None = None


class SearchRecord(Note):
    """What made the schedule.

    Attributes:
        method: ``dipgo``, ``paper``, ``import of …``, or the name of a fixed schedule.
        budget: the share of the full trajectory's cost that could be kept.
        cost: what the budget was a share of.
        choices: how many prompts or classes noise was paired with, and a digest of them in their order.
        starts: digests of the SubNets that the search began with.
        seconds: that the search took.
        chosen: the candidate that this is.
        best_policy: the best fixed schedule among the candidates; None where none was judged.
        held_out_psnr_db: of every candidate, on noise that nothing was learned from, in dB.
        source, published_macs, file, sha256: of an imported file.
    """

    method: str | None = None
    budget: float | None = None
    cost: BudgetKind = BudgetKind()
    seed: int = 0
    choices: dict[str, Any] | None = None
    starts: list[str] = Field(default_factory=list)
    processes: int | None = None
    settings: dict[str, Any] | None = None
    seconds: float | None = None
    chosen: str | None = None
    best_policy: str | None = None
    held_out_psnr_db: dict[str, float] = Field(default_factory=dict)
    versions: dict[str, str] | None = None
    source: str | None = None
    published_macs: Cost | None = None
    file: str | None = None
    sha256: str | None = None

    @property
    def psnr_db(self) -> float | None:
        """What the judge gave the candidate that was chosen."""
        return self.held_out_psnr_db.get(self.chosen or "")

    def describe(self) -> str:
        """Return one line on what was chosen, and how it did."""
        name = self.chosen or self.method or "?"
        return name if self.psnr_db is None else f"{name}: {self.psnr_db:.2f} dB on held-out noise"
