"""The bundle: the deployable folder, schema ``dipgo.bundle/1``. Free of torch: this is all that a runtime needs.

``bundle.json`` describes the program: per step the launches, each with the slots it reads and writes. Graphs lie flat
in the folder and point into the weights files, which lie as in the pipeline's own folder (``unet/…safetensors``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, FiniteFloat

from dipgo.base.errors import DipgoError
from dipgo.base.files import Kind, sha256_of, sha256_of_json
from dipgo.base.guidance import RESCALE, GuidanceScale, ScaleArgument
from dipgo.base.inputs import LARGEST_TENSORS, read_tensors
from dipgo.base.layout import Layout
from dipgo.base.records import (
    MOST_CALLS,
    Count,
    FileName,
    Line,
    ModelIdentity,
    Record,
    SamplerIdentity,
    Sha256,
    Timestep,
    read_object,
    read_record,
)
from dipgo.model.safetensors_index import read_file
from export.graphs import (
    AxisRecord,
    BranchRecord,
    DtypeName,
    GraphRecord,
    PrologueRecord,
    Shape,
    Size,
    TensorRecord,
    Tensors,
    read_signature,
)
from export.invariants import problem

SCHEMA = "dipgo.bundle/1"
RECORD_FILE = "bundle.json"
CURE = "export it again"
SCHEMA_FILE = Path(__file__).parent / "schemas" / "bundle-1.json"

WEIGHTS = ".safetensors"
ENGINES = "engines"
"""The folder for what is built of a bundle's graphs."""
_ENGINE = re.compile(r"\.engine(\.json|\.damaged)?$|^\.lock$")

Slot = Annotated[int, Field(ge=0, lt=100_000)]
Strength = Annotated[float, Field(gt=0, le=1)]
Class = Annotated[int, Field(ge=0, lt=2**31)]


def files_of(folder: Path) -> list[str]:
    """Return the files that a bundle's record names, and its engines; also of a record that is not valid any more."""
    try:
        files = list(read_object(folder / RECORD_FILE, "bundle").get("files", ()))
    except (DipgoError, TypeError):
        files = []
    return files + [f"{ENGINES}/{path.name}" for path in folder.glob(f"{ENGINES}/*") if _ENGINE.search(path.name)]


BUNDLE = Kind(RECORD_FILE, files_of)


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


class TokenizerRecord(Record):
    """A tokenizer (file of the ``tokenizers`` library) and the inputs of the text graph that it fills.

    Every prompt is put between ``before`` and ``after``, then cut and padded to ``length`` tokens, on one ``side``.
    ``expands`` has the tokens that stand for several vectors of a textual inversion, and what they are replaced by.
    """

    file: FileName
    ids: Line
    mask: Line | None
    length: int = Field(ge=1, le=2**20)
    pad_token: Line
    pad_id: int = Field(ge=0, lt=2**31)
    expands: dict[Line, str] = Field(default_factory=dict)
    before: str = Field(default="", max_length=100_000)
    after: str = Field(default="", max_length=100_000)
    side: Literal["right", "left"] = "right"


class TextRecord(Record):
    """Prompts to conditions: one graph that holds all text encoders.

    ``unconditional`` says what stands for no prompt: the empty prompt's encoding, or zeros. ``lower`` strips and
    lower-cases prompts first. ``fixed`` holds conditions that do not depend on the prompt, one row each; those of them
    that follow the image's size are in ``sized`` too, as expressions over the axes (in ``fixed`` at ``opt``). Outputs
    are conditions, and conditions with the encoders' last layers skipped: ``NAME.1``, ``NAME.2``, …. ``negative`` is
    how negative prompts, and the empty one in their place, become the same conditions where that is another way.
    """

    file: FileName
    tokenizers: list[TokenizerRecord] = Field(max_length=8)
    inputs: Tensors
    outputs: Tensors
    unconditional: Literal["encoded", "zeros"]
    lower: bool
    fixed: dict[Line, list[FiniteFloat]]
    sized: dict[Line, list[Size]] = Field(default_factory=dict)
    negative: TextRecord | None = None

    @property
    def ways(self) -> list[TextRecord]:
        """This record, and that of negative prompts where there is one."""
        return [self, *([self.negative] if self.negative else [])]


class GuidanceRecord(Record):
    """What the guidance scale of a request changes: conditions that are so many times the scale.

    A scale of at most ``off`` is no guidance: then the scale is ``neutral``, at which the image is that of the
    conditional pass.
    """

    inputs: dict[Line, FiniteFloat]
    off: FiniteFloat | None = None
    neutral: FiniteFloat = 1.0


class ConditioningRecord(Record):
    """What the user conditions on, and how it becomes graph inputs; ``prompt`` without an encoder takes embeddings.

    ``prompts`` are a few of those that the model's folder brings, if it does.
    """

    kind: Literal["class", "prompt", "nothing"]
    guided: bool
    inputs: Tensors
    null_class: Class | None = None
    labels: dict[Line, Class] = Field(default_factory=dict)
    prompts: list[Line] = Field(default_factory=list)
    fixed: dict[Line, list[FiniteFloat]] = Field(
        default_factory=dict, description="conditions that are the same for all prompts: one row each, flat"
    )
    guidance: GuidanceRecord | None = Field(
        default=None, description="how a request chooses the guidance scale; none where it is compiled in"
    )
    scale: ScaleArgument = Field(
        default="guidance_scale",
        description="the argument of the pipeline's call that is the guidance scale; by true_cfg_scale it guides where "
        "a negative prompt is given, and else not at all",
    )
    encoder: TextRecord | None = None

    def at(self, scale: GuidanceScale) -> ConditioningRecord:
        """Return the record where the usual guidance is another, as far as a request may choose it."""
        factors = self.guidance.inputs if self.guidance else {}
        values = {name: factor * scale for name, factor in factors.items()} | {RESCALE: scale.rescale}
        fixed = {name: [values[name]] if name in values else row for name, row in self.fixed.items()}
        return self.model_copy(update={"fixed": fixed})


class DecoderRecord(Record):
    """The VAE decoder: latent to pixels in [0, 1]."""

    file: FileName
    input: TensorRecord
    output: TensorRecord


class EncoderRecord(Record):
    """The VAE encoder: a picture in [-1, 1], ``[B, channels, rows, cell, columns, cell]`` by cells, to its latent.

    That is ``mean + deviation · z``, in the denoiser's scale, of noise z that lies as the initial noise does.
    """

    file: FileName
    input: TensorRecord
    mean: TensorRecord
    deviation: TensorRecord


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


class FileRecord(Record):
    bytes: Count
    sha256: Sha256


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


class AdaptersRecord(Record):
    """How requests bring LoRAs: each program again, with low-rank branches whose matrices are inputs.

    Adapters that are active together lie side by side along the rank; what is left of it is zeros.
    """

    rank: int = Field(ge=1, le=1024)
    inputs: Tensors
    branches: list[BranchRecord] = Field(max_length=100_000)
    programs: list[ProgramRecord] = Field(max_length=101, description="in the order of the bundle's programs")


class UnguidedRecord(Record):
    """Each program again, with the conditional pass alone: what a request that asks for no guidance runs.

    ``inputs`` and ``fixed`` are as those of the bundle's conditioning, for one pass.
    """

    inputs: Tensors
    fixed: dict[Line, list[FiniteFloat]]
    programs: list[ProgramRecord] = Field(max_length=101, description="in the order of the bundle's programs")


class BundleRecord(ProgramRecord):
    """``bundle.json``: a program, what it runs on, and further programs that share that."""

    schema_id: Literal["dipgo.bundle/1"] = Field(alias="schema", default="dipgo.bundle/1")
    model: ModelIdentity
    random_weights: bool = Field(description="images are meaningless: for speed and structure only")
    dtype: Literal["float32", "float16", "bfloat16"]
    layout: Literal["signature", "segment", "step"]
    latent: TensorRecord
    axes: dict[Line, AxisRecord] = Field(
        default_factory=dict,
        description="sizes that are chosen at run time: batch in images, height and width in cells of the latent",
    )
    pixels: tuple[Count, Count] | None = Field(
        default=None, description="height and width of images, where the latent's shape does not tell"
    )
    noise: Layout | None = Field(default=None, description="how drawn noise becomes the latent; none where it is it")
    cell: int = Field(default=8, ge=1, le=1024, description="pixels a side of a cell of the latent")
    conditioning: ConditioningRecord
    graphs: dict[Line, GraphRecord] = Field(min_length=1)
    further: list[ProgramRecord] = Field(
        default_factory=list, max_length=100, description="other programs of the model, which a request may choose"
    )
    adapters: AdaptersRecord | None = Field(default=None, description="none where requests bring no LoRAs")
    unguided: UnguidedRecord | None = Field(
        default=None, description="none where no guidance takes as long as guidance, or there is never any"
    )
    decoder: DecoderRecord | None
    encoder: EncoderRecord | None = Field(default=None, description="how pictures become latents; none if they do not")
    weights: Literal["copy", "in-place"]
    files: dict[FileName, FileRecord]
    versions: dict[Line, Line]
    sha256: str = Field(default="", description="of this record as canonical JSON, with this field empty")

    @property
    def programs(self) -> list[BundleRecord]:
        """Each program as the record of a bundle that holds no other; the first is what requests get by default."""
        shared = (self.adapters and self.adapters.programs) or self.unguided
        return [self._alone(program) for program in (self, *self.further)] if self.further or shared else [self]

    @property
    def adapted(self) -> list[BundleRecord]:
        """Likewise each program with low-rank branches, in the same order; empty where requests bring no LoRAs."""
        return [self._alone(program) for program in (self.adapters.programs if self.adapters else ())]

    @property
    def one_pass(self) -> list[BundleRecord]:
        """Likewise each program with the conditional pass alone; empty where there are none."""
        if self.unguided is None:
            return []
        own = {"guided": False, "guidance": None, "inputs": self.unguided.inputs, "fixed": self.unguided.fixed}
        record = self.model_copy(update={"conditioning": self.conditioning.model_copy(update=own)})
        return [record._alone(program) for program in self.unguided.programs]

    @property
    def _every_program(self) -> list[ProgramRecord]:
        adapted = self.adapters.programs if self.adapters else []
        return [self, *self.further, *adapted, *(self.unguided.programs if self.unguided else ())]

    def _alone(self, program: ProgramRecord) -> BundleRecord:
        own = {name: getattr(program, name) for name in ProgramRecord.model_fields}
        launched = {launch.graph for step in program.steps for launch in step.launches}
        graphs = {name: graph for name, graph in self.graphs.items() if name in launched}
        conditioning = self.conditioning.at(program.sampler.guidance)
        adapters = self.adapters.model_copy(update={"programs": []}) if self.adapters else None
        shared = {"graphs": graphs, "conditioning": conditioning, "further": [], "adapters": adapters, "unguided": None}
        return self.model_copy(update={**own, **shared})

    @property
    def loaded(self) -> list[str]:
        """The graphs that every trajectory of the first program launches, of the loop and before it, by file."""
        first = self.programs[0]
        return [graph.file for graph in first.graphs.values()] + [graph.file for graph in first.prologues]

    @property
    def tensors(self) -> dict[str, tuple[list[TensorRecord], list[TensorRecord]]]:
        """Inputs and outputs of all graphs by file: of the loop, before it, then those of texts and pictures."""
        tensors = {graph.file: (graph.inputs, graph.outputs) for graph in self.graphs.values()}
        for program in self._every_program:
            tensors |= {prologue.file: (prologue.inputs, prologue.outputs) for prologue in program.prologues}
            if program.start:
                tensors[program.start.graph.file] = (program.start.graph.inputs, program.start.graph.outputs)
        for text in self.conditioning.encoder.ways if self.conditioning.encoder else ():
            tensors[text.file] = (text.inputs, text.outputs)
        if self.decoder:
            tensors[self.decoder.file] = ([self.decoder.input], [self.decoder.output])
        if self.encoder:
            tensors[self.encoder.file] = ([self.encoder.input], [self.encoder.mean, self.encoder.deviation])
        return tensors

    @property
    def used(self) -> set[str]:
        """The files that this record names as parts of the program; each must be in ``files``, with its checksum."""
        ways = self.conditioning.encoder.ways if self.conditioning.encoder else []
        tokenizers = [tokenizer.file for text in ways for tokenizer in text.tokenizers]
        own = [file for each in self._every_program for file in (each.tables_file, each.subnet_file)]
        return {*self.tensors, *tokenizers, *own}

    def sealed(self) -> BundleRecord:
        """Return the record with its own checksum."""
        blank = self.model_copy(update={"sha256": ""})
        return blank.model_copy(update={"sha256": sha256_of_json(blank.model_dump(mode="json", by_alias=True))})


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema that is published as ``export/schemas/bundle-1.json``."""
    return BundleRecord.model_json_schema(by_alias=True)


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk, whose parts fit together: see :mod:`export.invariants`.

    Attributes:
        folder: where it lies.
        record: the content of ``bundle.json``.
        tables: values by step, ``[calls, …]`` each, by name, of the first program.
        further: the other programs, each as a bundle that holds no other.
        adapted: the program with low-rank branches; None where requests bring no LoRAs.
        unguided: the program with the conditional pass alone, if there is one.
    """

    folder: Path
    record: BundleRecord
    tables: dict[str, np.ndarray]
    further: tuple[Bundle, ...] = ()
    adapted: Bundle | None = None
    unguided: Bundle | None = None

    @property
    def programs(self) -> tuple[Bundle, ...]:
        """Each program as a bundle that holds no other, the first first."""
        several = self.further or self.adapted or self.unguided
        first = replace(self, record=self.record.programs[0], further=()) if several else self
        return first, *self.further


def open_bundle(folder: Path, check_files: bool = True) -> Bundle:
    """Read a bundle, check its files against their recorded sizes and checksums, and that its parts fit together.

    Raises:
        DipgoError: no bundle there, another schema version, a missing, altered or unlisted file, a link, or records
            that contradict each other, the tables or the graphs.
    """
    if not folder.is_dir():
        raise DipgoError(f"{folder}: no such bundle; make one with 'dipgo export' or 'dipgo compile'")
    path = folder / RECORD_FILE
    record = read_record(path, BundleRecord, SCHEMA, "bundle", CURE)
    if record.sha256 != record.sealed().sha256:
        raise DipgoError(
            f"{path}: altered since the bundle was made (checksum differs), or made by another dipgo; {CURE}"
        )
    if unlisted := sorted(record.used - record.files.keys()):
        raise DipgoError(f"{path}: '{unlisted[0]}' is not among its files; {CURE}")
    for name, expected in record.files.items():
        _check_place(folder, name, expected.bytes)
        if name.endswith(WEIGHTS) and name not in record.used:
            read_file(folder / name)  # of any size, and filled by its tensors
        elif expected.bytes > LARGEST_TENSORS:  # its reader allows less
            raise DipgoError(f"{folder / name}: larger than any such part of a bundle; {CURE}")
    for name, expected in record.files.items() if check_files else ():
        if sha256_of(folder / name) != expected.sha256:
            raise DipgoError(f"{folder / name}: altered since the bundle was made (checksum differs); {CURE}")
    # A server may be without onnx: then its runtime alone refuses graphs that are not as the record says.
    graphs = {name: read_signature(folder / name, CURE) for name in record.tensors} if find_spec("onnx") else {}
    for what, others in (("low-rank branches", record.adapted), ("one pass", record.one_pass)):
        if others and len(others) != len(record.programs):
            raise DipgoError(f"{path}: not every program has one with {what}; {CURE}")
    programs = []
    for own in (*record.programs, *record.adapted, *record.one_pass):
        tables = read_tensors(folder / own.tables_file, "table of a bundle", CURE)
        if broken := problem(own, tables, {name: graphs[name] for name in own.tensors if graphs}):
            raise DipgoError(f"{path}: {broken}; {CURE}")
        programs.append(Bundle(folder, own, tables))
    count = len(record.programs)
    adapted, unguided = programs[count:][: len(record.adapted)], programs[count + len(record.adapted) :]
    first, *further = (
        replace(own, adapted=branched, unguided=alone)
        for own, branched, alone in zip_longest(programs[:count], adapted, unguided)
    )
    return replace(first, record=record, further=tuple(further))


def _check_place(folder: Path, name: str, size: int) -> None:
    """Check that a file lies in the bundle, not behind a link, and has its size."""
    path = folder / name
    if ".." in Path(name).parts or not path.is_relative_to(folder) or not path.is_file():
        raise DipgoError(f"{path}: missing from the bundle; {CURE}")
    if path.resolve() != folder.resolve() / name:
        raise DipgoError(f"{path}: lies behind a link, which a bundle has none of; copy the bundle with cp -rL")
    if path.stat().st_size != size:
        raise DipgoError(f"{path}: altered since the bundle was made (its size differs); {CURE}")
