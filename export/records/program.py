"""What a SubNet became, as the bundle's record has it: launches by step, slots, solver, starts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dipgo.base.records import MOST_CALLS, Count, FileName, Line, Record, SamplerIdentity, Timestep
from export.records.graphs import DtypeName, GraphRecord, PrologueRecord, Shape

Slot = Annotated[int, Field(ge=0, lt=100_000)]
Strength = Annotated[float, Field(gt=0, le=1)]


class LaunchRecord(Record):
    """One launch of a graph: ``reads`` maps inputs to slots, ``writes`` outputs to slots."""

    graph: Line
    reads: dict[Line, Slot]
    writes: dict[Line, Slot]


class StepRecord(Record):
    """One call of the denoiser; no launches where ε is provably the last ε.

    ``latent`` is the slot of x before the step, ``epsilon`` the slot of ε after it.
    """

    timestep: Timestep
    launches: list[LaunchRecord] = Field(max_length=1000)
    latent: Slot
    epsilon: Slot


class SlotRecord(Record):
    """Memory for one value at a time; values whose lifetimes do not overlap share a slot.

    ``bytes`` are those of the largest sizes.
    """

    dtype: DtypeName
    shape: Shape
    bytes: Count


class SolverRecord(Record):
    """How x goes from step to step.

    ``graph``: the last graph of a step also writes the next x, so the loop is nothing but launches; silent steps are
    part of the launch before them. ``host``: the runtime applies the table between launches, because the sampler
    needs more history than graphs keep. The table of the sampler (see ``dipgo.model.sampler``) lies in the tables file:
    ``solver.rows`` and ``solver.input_scale``, float64; x_k = rows[k] · [z, z_1, …, z_draws, ε_0, ε_1, …] with z the
    initial noise.

    ``history`` is how many past x and ε the graphs combine, ``result`` the slot of the final x, ``draws`` how often the
    sampler draws noise of the latent's shape: after the initial noise, from the same generator, for all images at
    once. Such samplers run on the host.
    """

    kind: Literal["graph", "host"]
    history: int = Field(ge=0, le=MOST_CALLS)
    result: Slot
    draws: int = Field(default=0, ge=0, le=MOST_CALLS)


class StartRecord(Record):
    """How trajectories begin with a picture, at a later step: tables of :mod:`dipgo.model.starts`, and a graph.

    The graph computes every site and hands out all that later steps read. Of n steps and a strength s a request does
    the last int(n s) where ``rounds`` is down, and leaves out the first int(n - n s) where it is up; each of these is
    ``order`` calls of the denoiser.
    """

    graph: GraphRecord
    order: int = Field(ge=1, le=8)
    rounds: Literal["down", "up"]
    strengths: tuple[Strength, Strength] = Field(description="of pictures, and of pictures with a mask, by default")


class PartRecord(Record):
    """A part of the denoiser by binding time: when it runs, its parameters, its MACs in one trajectory."""

    part: Literal["table", "prompt", "steps", "loop"]
    parameters: Count
    macs: Count


class ProgramRecord(Record):
    """What a SubNet became: which graphs run when, on what."""

    sampler: SamplerIdentity
    solver: SolverRecord
    prologues: list[PrologueRecord] = Field(max_length=100)
    slots: list[SlotRecord] = Field(max_length=100_000)
    steps: list[StepRecord] = Field(min_length=1, max_length=MOST_CALLS)
    parts: list[PartRecord] = Field(min_length=1, max_length=4)
    start: StartRecord | None = Field(default=None, description="how trajectories begin with a picture; none if never")
    tables_file: FileName = Field(description="values by step: backup weights, timestep embeddings, the solver")
    subnet_file: FileName
    macs: Count = Field(description="of one row of a trajectory; as all MACs here at the size of ``opt``")
    budget: float = Field(ge=0, le=1.001, description="these MACs over the full trajectory's")
    naive_cache_bytes: Count = Field(description="what the cache would take if every site's outputs were kept")

    @property
    def awaited(self) -> list[dict[int, str]]:
        """By step, the slots that later steps read before they write them, and which site's output each holds."""
        result: list[dict[int, str]] = []
        slots: dict[int, str] = {}
        for step in reversed(self.steps):
            result.append(slots)
            for launch in reversed(step.launches):
                own = {slot: feature for name, slot in launch.reads.items() if (feature := _feature_of(name))}
                slots = {slot: name for slot, name in slots.items() if slot not in launch.writes.values()} | own
        return result[::-1]


def _feature_of(name: str) -> str | None:
    """Return the site's output that a graph's input is, as it is or as a term of its backup; None where it is none."""
    kind, _, rest = name.partition(".")
    return {"feature": name, "cache": f"feature.{rest.rpartition('.')[0]}"}.get(kind)
