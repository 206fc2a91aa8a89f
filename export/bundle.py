"""The bundle: the deployable folder, schema ``dipgo.bundle/1``. Free of torch: this is all that a runtime needs.

``bundle.json`` describes the program: per step the graph, the cache slots it reads and writes, the rows of the backup
table, and the solver as a table of coefficients. All graphs lie flat beside one weights file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field
from safetensors.numpy import load_file

from dipgo.errors import DipgoError
from dipgo.files import sha256_of, sha256_of_json
from dipgo.records import ModelIdentity, Record, SamplerIdentity, read_record

SCHEMA = "dipgo.bundle/1"
RECORD_FILE = "bundle.json"
SCHEMA_FILE = Path(__file__).parent / "schemas" / "bundle-1.json"


class TensorRecord(Record):
    """A graph's input or output; ``dtype`` is numpy's name."""

    name: str
    dtype: str
    shape: list[int]


class CoefficientRecord(Record):
    """A graph input that carries one term's weights of a backup: ``tensor[step, term]``, reshaped to the input."""

    tensor: str
    term: int


class GraphRecord(Record):
    """One static graph. ``signature`` names the sites it computes, as a string of 0 and 1 over the SubNet's sites."""

    file: str
    signature: str
    macs: int
    inputs: list[TensorRecord]
    outputs: list[TensorRecord]
    coefficients: dict[str, CoefficientRecord]


class PrologueRecord(Record):
    """A graph that runs before the loop and hands values to the step graphs.

    ``steps``: once for all steps; the rows of its batch are [step, half, image], the halves being those of guidance.
    Its ``timestep`` has one entry a row.
    ``prompt``: once a prompt or class, on the batch of a step.
    """

    file: str
    kind: Literal["steps", "prompt"]
    inputs: list[TensorRecord]
    outputs: list[TensorRecord]


class StepRecord(Record):
    """One call of the denoiser.

    ``graph`` is None where ε is provably the last ε: nothing is launched. ``reads`` maps the graph's cache inputs to
    slots, ``writes`` its feature outputs to slots.
    """

    timestep: float
    graph: str | None
    reads: dict[str, int]
    writes: dict[str, int]


class SlotRecord(Record):
    """Memory for one cached feature at a time; features whose lifetimes do not overlap share a slot."""

    dtype: str
    shape: list[int]
    bytes: int


class SolverRecord(Record):
    """The sampler as a table (see ``dipgo.sampler``): x_k = rows[k] · [noise, ε_0, ε_1, …]."""

    input_scale: list[float]
    rows: list[list[float]]


class ConditioningRecord(Record):
    """What the user conditions on, and how it becomes graph inputs."""

    kind: Literal["class", "prompt"]
    guided: bool
    inputs: list[TensorRecord]
    null_class: int | None = None
    labels: dict[str, int] = Field(default_factory=dict)


class DecoderRecord(Record):
    """The VAE decoder: latent to pixels in [0, 1]."""

    file: str
    input: TensorRecord
    output: TensorRecord


class FileRecord(Record):
    bytes: int
    sha256: str


class BundleRecord(Record):
    """``bundle.json``."""

    schema_id: Literal["dipgo.bundle/1"] = Field(alias="schema", default="dipgo.bundle/1")
    model: ModelIdentity
    sampler: SamplerIdentity
    latent: TensorRecord
    conditioning: ConditioningRecord
    solver: SolverRecord
    prologues: list[PrologueRecord]
    graphs: dict[str, GraphRecord]
    slots: list[SlotRecord]
    steps: list[StepRecord]
    weights_file: str
    backups_file: str | None
    decoder: DecoderRecord
    subnet_file: str
    macs: int
    naive_cache_bytes: int = Field(description="what the cache would take if every site's outputs were kept")
    files: dict[str, FileRecord]
    versions: dict[str, str]
    sha256: str = Field(default="", description="of this record as canonical JSON, with this field empty")

    def sealed(self) -> BundleRecord:
        """Return the record with its own checksum."""
        blank = self.model_copy(update={"sha256": ""})
        return blank.model_copy(update={"sha256": sha256_of_json(blank.model_dump(mode="json", by_alias=True))})


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema that is published as ``export/schemas/bundle-1.json``."""
    return BundleRecord.model_json_schema(by_alias=True)


class Bundle:
    """A bundle on disk, validated.

    Attributes:
        folder: where it lies.
        record: the content of ``bundle.json``.
        backups: the backup table, tensors ``[calls, K]`` or ``[calls, K, channels]`` by name.
    """

    def __init__(self, folder: Path, record: BundleRecord) -> None:
        self.folder = folder
        self.record = record
        self.backups: dict[str, np.ndarray] = load_file(folder / record.backups_file) if record.backups_file else {}


def open_bundle(folder: Path, check_files: bool = True) -> Bundle:
    """Read a bundle and check its files against their recorded sizes and checksums.

    Raises:
        DipgoError: no bundle there, another schema version, or a missing or altered file.
    """
    if not folder.is_dir():
        raise DipgoError(f"{folder}: no such bundle; make one with 'dipgo export' or 'dipgo compile'")
    record = read_record(folder / RECORD_FILE, BundleRecord, SCHEMA, "bundle", "export it again")
    if record.sha256 != record.sealed().sha256:
        path = folder / RECORD_FILE
        raise DipgoError(f"{path}: altered since the bundle was made (checksum differs); export it again")
    for name, expected in record.files.items():
        path = folder / name
        if name != Path(name).name or not path.is_file():
            raise DipgoError(f"{path}: missing from the bundle; export it again")
        if path.stat().st_size != expected.bytes or (check_files and sha256_of(path) != expected.sha256):
            raise DipgoError(f"{path}: altered since the bundle was made (checksum differs); export it again")
    return Bundle(folder, record)
