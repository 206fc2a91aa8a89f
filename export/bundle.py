"""The bundle: the deployable folder, schema ``dipgo.bundle/1``. Free of torch: this is all that a runtime needs.

``bundle.json`` describes the program: per step the launches, each with the slots it reads and writes. Graphs lie flat
in the folder and point into the weights files, which lie as in the pipeline's own folder (``unet/…safetensors``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field
from safetensors import SafetensorError
from safetensors.numpy import load_file

from dipgo.base.errors import DipgoError
from dipgo.base.files import sha256_of, sha256_of_json
from dipgo.base.records import ModelIdentity, Record, SamplerIdentity, read_record
from export.graphs import AxisRecord, GraphRecord, PrologueRecord, Size, TensorRecord

SCHEMA = "dipgo.bundle/1"
RECORD_FILE = "bundle.json"
SCHEMA_FILE = Path(__file__).parent / "schemas" / "bundle-1.json"


class LaunchRecord(Record):
    """One launch of a graph: ``reads`` maps inputs to slots, ``writes`` outputs to slots."""

    graph: str
    reads: dict[str, int]
    writes: dict[str, int]


class StepRecord(Record):
    """One call of the denoiser; no launches where ε is provably the last ε.

    ``latent`` is the slot of x before the step, ``epsilon`` the slot of ε after it.
    """

    timestep: float
    launches: list[LaunchRecord]
    latent: int
    epsilon: int


class SlotRecord(Record):
    """Memory for one value at a time; values whose lifetimes do not overlap share a slot.

    ``bytes`` are those of the largest sizes.
    """

    dtype: str
    shape: list[Size]
    bytes: int


class SolverRecord(Record):
    """How x goes from step to step.

    ``graph``: the last graph of a step also writes the next x, so the loop is nothing but launches; silent steps are
    part of the launch before them. ``host``: the runtime applies the table between launches, because the sampler
    needs more history than graphs keep. The table of the sampler (see ``dipgo.model.sampler``) lies in the tables file:
    ``solver.rows`` and ``solver.input_scale``, float64; x_k = rows[k] · [noise, ε_0, ε_1, …].

    ``history`` is how many past x and ε the graphs combine, ``result`` the slot of the final x.
    """

    kind: Literal["graph", "host"]
    history: int
    result: int


class TokenizerRecord(Record):
    """A tokenizer (file of the ``tokenizers`` library) and the inputs of the text graph that it fills.

    Every prompt is cut and padded to ``length`` tokens. ``expands`` has the tokens that stand for several vectors of a
    textual inversion, and what they are replaced by.
    """

    file: str
    ids: str
    mask: str | None
    length: int
    pad_token: str
    pad_id: int
    expands: dict[str, str] = Field(default_factory=dict)


class TextRecord(Record):
    """Prompts to conditions: one graph that holds all text encoders.

    ``unconditional`` says what stands for no prompt: the empty prompt's encoding, or zeros. ``lower`` strips and
    lower-cases prompts first. ``fixed`` holds conditions that do not depend on the prompt, one row each; those of them
    that follow the image's size are in ``sized`` too, as expressions over the axes (in ``fixed`` at ``opt``). Outputs
    are conditions, and conditions with the encoders' last layers skipped: ``NAME.1``, ``NAME.2``, ….
    """

    file: str
    tokenizers: list[TokenizerRecord]
    inputs: list[TensorRecord]
    outputs: list[TensorRecord]
    unconditional: Literal["encoded", "zeros"]
    lower: bool
    fixed: dict[str, list[float]]
    sized: dict[str, list[Size]] = Field(default_factory=dict)


class ConditioningRecord(Record):
    """What the user conditions on, and how it becomes graph inputs; ``prompt`` without an encoder takes embeddings.

    ``prompts`` are a few of those that the model's folder brings, if it does.
    """

    kind: Literal["class", "prompt", "nothing"]
    guided: bool
    inputs: list[TensorRecord]
    null_class: int | None = None
    labels: dict[str, int] = Field(default_factory=dict)
    prompts: list[str] = Field(default_factory=list)
    encoder: TextRecord | None = None


class DecoderRecord(Record):
    """The VAE decoder: latent to pixels in [0, 1]."""

    file: str
    input: TensorRecord
    output: TensorRecord


class FileRecord(Record):
    bytes: int
    sha256: str


class PartRecord(Record):
    """A part of the denoiser by binding time: when it runs, its parameters, its MACs in one trajectory."""

    part: Literal["table", "prompt", "steps", "loop"]
    parameters: int
    macs: int


class BundleRecord(Record):
    """``bundle.json``."""

    schema_id: Literal["dipgo.bundle/1"] = Field(alias="schema", default="dipgo.bundle/1")
    model: ModelIdentity
    random_weights: bool = Field(description="images are meaningless: for speed and structure only")
    sampler: SamplerIdentity
    dtype: Literal["float32", "float16", "bfloat16"]
    layout: Literal["signature", "segment", "step"]
    latent: TensorRecord
    axes: dict[str, AxisRecord] = Field(
        default_factory=dict,
        description="sizes that are chosen at run time: batch in images, height and width in cells of the latent",
    )
    cell: int = Field(default=8, description="pixels a side of a cell of the latent")
    conditioning: ConditioningRecord
    solver: SolverRecord
    prologues: list[PrologueRecord]
    graphs: dict[str, GraphRecord]
    slots: list[SlotRecord]
    steps: list[StepRecord]
    parts: list[PartRecord]
    tables_file: str = Field(description="values by step: backup weights, timestep embeddings, the solver")
    decoder: DecoderRecord | None
    subnet_file: str
    macs: int = Field(description="of one row of a trajectory; as all MACs here at the size of ``opt``")
    naive_cache_bytes: int = Field(description="what the cache would take if every site's outputs were kept")
    weights: Literal["copy", "in-place"]
    files: dict[str, FileRecord]
    versions: dict[str, str]
    sha256: str = Field(default="", description="of this record as canonical JSON, with this field empty")

    @property
    def loaded(self) -> list[str]:
        """The graphs that every trajectory launches, of the loop and before it, by file."""
        return [graph.file for graph in self.graphs.values()] + [graph.file for graph in self.prologues]

    @property
    def tensors(self) -> dict[str, tuple[list[TensorRecord], list[TensorRecord]]]:
        """Inputs and outputs of all graphs by file: of the loop, before it, then the text encoders and the decoder."""
        tensors = {graph.file: (graph.inputs, graph.outputs) for graph in self.graphs.values()}
        tensors |= {prologue.file: (prologue.inputs, prologue.outputs) for prologue in self.prologues}
        if text := self.conditioning.encoder:
            tensors[text.file] = (text.inputs, text.outputs)
        if self.decoder:
            tensors[self.decoder.file] = ([self.decoder.input], [self.decoder.output])
        return tensors

    @property
    def used(self) -> set[str]:
        """The files that this record names as parts of the program; each must be in ``files``, with its checksum."""
        text = self.conditioning.encoder
        tokenizers = [tokenizer.file for tokenizer in text.tokenizers] if text else []
        return {*self.tensors, *tokenizers, self.tables_file, self.subnet_file}

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
        tables: values by step, ``[calls, …]`` each, by name.
    """

    def __init__(self, folder: Path, record: BundleRecord) -> None:
        self.folder = folder
        self.record = record
        try:
            self.tables: dict[str, np.ndarray] = load_file(folder / record.tables_file)
        except SafetensorError as error:
            path = folder / record.tables_file
            raise DipgoError(f"{path}: not a safetensors file ({error}); export it again") from error


def open_bundle(folder: Path, check_files: bool = True) -> Bundle:
    """Read a bundle and check its files against their recorded sizes and checksums.

    Raises:
        DipgoError: no bundle there, another schema version, or a missing, altered or unlisted file.
    """
    if not folder.is_dir():
        raise DipgoError(f"{folder}: no such bundle; make one with 'dipgo export' or 'dipgo compile'")
    record = read_record(folder / RECORD_FILE, BundleRecord, SCHEMA, "bundle", "export it again")
    if record.sha256 != record.sealed().sha256:
        path = folder / RECORD_FILE
        raise DipgoError(
            f"{path}: altered since the bundle was made (checksum differs), or made by another dipgo; export it again"
        )
    if unlisted := sorted(record.used - record.files.keys()):
        raise DipgoError(f"{folder / RECORD_FILE}: '{unlisted[0]}' is not among its files; export it again")
    for name, expected in record.files.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts or not path.is_file():
            raise DipgoError(f"{path}: missing from the bundle; export it again")
        if path.stat().st_size != expected.bytes or (check_files and sha256_of(path) != expected.sha256):
            raise DipgoError(f"{path}: altered since the bundle was made (checksum differs); export it again")
    return Bundle(folder, record)
