"""The SubNet: what the search finds and the compiler takes.

``NAME.json`` (schema ``dipgo.subnet/1``, published in ``dipgo/schemas/subnet-1.json``) holds the gates and everything
needed to refuse a mismatched request; learned backup weights lie in ``NAME.safetensors`` beside it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field
from safetensors.numpy import save_file

from dipgo.base.errors import DipgoError
from dipgo.base.files import new_file, sha256_of
from dipgo.base.inputs import LARGEST_TENSORS, open_input, read_tensors
from dipgo.base.records import MOST_CALLS, Count, FileName, Line, ModelIdentity, Record, SamplerIdentity, read_record
from dipgo.graph.sites import Site
from dipgo.schedule.schedule import Schedule, backup_name, site_of_backup
from dipgo.schedule.search_record import Cost, SearchRecord

if TYPE_CHECKING:  # SubNets are read without torch
    from dipgo.graph.trace import Trace

SCHEMA = "dipgo.subnet/1"
SCHEMA_FILE = Path(__file__).parents[1] / "schemas" / "subnet-1.json"


class SiteRecord(Record):
    name: Line
    macs: Count
    params: Count
    channel_axis: int = Field(ge=0, le=7)


class BackupRecord(Record):
    """Learned backups: ``terms`` is K, how many computed outputs are combined; the weights lie in ``file``."""

    terms: int = Field(ge=1, le=MOST_CALLS)
    file: FileName
    sha256: str


class SubNetRecord(Record):
    """The JSON file."""

    schema_id: Literal["dipgo.subnet/1"] = Field(alias="schema", default="dipgo.subnet/1")
    model: ModelIdentity
    sampler: SamplerIdentity
    sites: list[SiteRecord] = Field(min_length=1, max_length=10_000)
    gates: list[list[Annotated[int, Field(ge=0, le=1)]]] = Field(
        description="[steps][sites], 1 = compute", max_length=MOST_CALLS
    )
    backup: BackupRecord | None
    cost: Cost
    search: SearchRecord


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema that is published as ``dipgo/schemas/subnet-1.json``."""
    return SubNetRecord.model_json_schema(by_alias=True)


@dataclass(frozen=True)
class SubNet:
    """A schedule, the identity of what it was searched on, and what the search says of it."""

    model: ModelIdentity
    sampler: SamplerIdentity
    sites: tuple[Site, ...]
    schedule: Schedule
    cost: Cost
    search: SearchRecord = field(default_factory=SearchRecord)

    @property
    def gates(self) -> np.ndarray:
        """The schedule's gates, bool ``[calls, sites]``, True = compute."""
        return self.schedule.gates

    @property
    def calls(self) -> int:
        """Calls of the denoiser in one trajectory (more than ``sampler.steps`` for some solvers)."""
        return self.schedule.calls

    def under(self, schedule: Schedule, trace: Trace) -> SubNet:
        """Return the SubNet with another schedule, at its cost in the traced graph."""
        return replace(self, schedule=schedule, cost=Cost.of(schedule, trace.macs))


def make_subnet(trace: Trace, sampler: SamplerIdentity, schedule: Schedule, search: SearchRecord) -> SubNet:
    """Return the SubNet that a canonical schedule is on a traced model under a sampler."""
    cost = Cost.of(schedule, trace.macs)
    return SubNet(trace.model.identity(), sampler, trace.sites, schedule, cost, search)


def check(subnet: SubNet, history: int | None = None) -> None:
    """Check what the schema cannot: shapes, finite weights, a first step that computes everything.

    Args:
        history: K, where it is known apart from the weights.

    Raises:
        ValueError: with one line that says what is wrong.
    """
    calls, count = len(subnet.sampler.timesteps), len(subnet.sites)
    gates, backups = subnet.gates, subnet.schedule.backups
    history = history or subnet.schedule.history
    guidance = subnet.sampler.guidance_scale
    if gates.shape != (calls, count):
        raise ValueError(f"gates are {list(gates.shape)}, expected [{calls} timesteps, {count} sites]")
    if not gates[0].all():
        raise ValueError("step 0 skips a site, but nothing is cached yet; the first row of gates must be all 1")
    names = {site.name for site in subnet.sites}
    if len(names) < count:
        raise ValueError("two sites have one name")
    for name, weights in backups.items():
        if site_of_backup(name) not in names:
            raise ValueError(f"backup tensor '{name}' belongs to no site")
        if weights.dtype != np.float32:
            raise ValueError(f"'{name}' is {weights.dtype}, expected float32")
        if weights.ndim not in (2, 3, 4) or weights.shape[:2] != (calls, history):
            raise ValueError(
                f"'{name}' is {list(weights.shape)}, expected [{calls}, {history}], with channels after it, or 2 "
                "and channels"
            )
        if weights.ndim == 4 and (weights.shape[2] != 2 or guidance <= 1):
            raise ValueError(
                f"'{name}' has weights for {weights.shape[2]} passes of guidance, but guidance {guidance:g} has "
                f"{2 if guidance > 1 else 1}"
            )
        if not np.isfinite(weights).all():
            raise ValueError(f"'{name}' holds NaN or infinite coefficients")
    missing = [site.name for site in subnet.sites if backups and backup_name(site.name) not in backups]
    if missing:
        raise ValueError(f"site '{missing[0]}' has no backup tensor")


def save_subnet(subnet: SubNet, path: Path, force: bool = False) -> None:
    """Write ``path`` (JSON) and, where backups are learned, the safetensors file beside it.

    The weights go first: a new JSON is always complete, and one that was to be replaced tells by its checksum.
    """
    check(subnet)
    schedule, backup = subnet.schedule, None
    if schedule.learned:
        beside = weights_file(path)
        with new_file(beside, force) as draft:
            save_file({name: np.ascontiguousarray(array) for name, array in schedule.backups.items()}, draft)
        backup = BackupRecord(terms=schedule.history, file=beside.name, sha256=sha256_of(beside))
    record = SubNetRecord(
        model=subnet.model,
        sampler=subnet.sampler,
        sites=[SiteRecord(**vars(site)) for site in subnet.sites],
        gates=schedule.gates.astype(int).tolist(),
        backup=backup,
        cost=subnet.cost,
        search=subnet.search,
    )
    with new_file(path, force) as draft:
        draft.write_text(_one_row_a_line(record.model_dump(mode="json", by_alias=True)) + "\n")


def weights_file(path: Path) -> Path:
    """Return where the learned backups of a SubNet's JSON file lie: beside it."""
    return path.with_name(path.name.removesuffix(".json") + ".safetensors")


def load_subnet(path: Path) -> SubNet:
    """Read and validate a SubNet.

    Raises:
        DipgoError: a missing or damaged file, another schema version, wrong shapes, NaN coefficients.
    """
    record = read_record(path, SubNetRecord, SCHEMA, "SubNet", "search again")
    weights: dict[str, np.ndarray] = {}
    if record.backup:
        beside = path.parent / record.backup.file
        if record.backup.file != Path(record.backup.file).name or not beside.is_file():
            raise DipgoError(f"{path}: its backup weights '{record.backup.file}' are not beside it; copy both files")
        open_input(beside, "backup weights", LARGEST_TENSORS).close()
        if sha256_of(beside) != record.backup.sha256:
            raise DipgoError(f"{beside}: not the weights that {path.name} was saved with; copy both files again")
        weights = read_tensors(beside, "backup weights", "search again")
    ragged = len({len(row) for row in record.gates}) != 1
    gates = np.zeros((len(record.gates), 0), bool) if ragged else np.array(record.gates, bool)
    sites = tuple(Site(**site.model_dump()) for site in record.sites)
    subnet = SubNet(record.model, record.sampler, sites, Schedule(gates, weights), record.cost, record.search)
    try:
        check(subnet, record.backup.terms if record.backup else None)
    except ValueError as error:
        raise DipgoError(f"{path}: {error}; search again, or mend the file") from error
    return subnet


def _one_row_a_line(document: dict[str, Any]) -> str:
    """Indent the document, with each row of gates on a line of its own: a map that people can read and diff."""
    text = json.dumps({**document, "gates": "GATES"}, indent=2)
    rows = ",\n".join("    " + json.dumps(row) for row in document["gates"])
    return text.replace('"GATES"', f"[\n{rows}\n  ]")
