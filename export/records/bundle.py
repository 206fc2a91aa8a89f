"""``bundle.json``, schema ``dipgo.bundle/1``: a program, what it runs on, and further ones that share that.

Graphs lie flat in the folder and point into the weights files, which lie as in the pipeline's own folder
(``unet/…safetensors``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, FiniteFloat

from dipgo.base.files import sha256_of_json
from dipgo.base.layout import Layout
from dipgo.base.records import Count, FileName, Line, ModelIdentity, Record, Sha256
from export.records.conditioning import ConditioningRecord
from export.records.graphs import AxisRecord, BranchRecord, GraphRecord, TensorRecord, Tensors
from export.records.program import ProgramRecord

SCHEMA = "dipgo.bundle/1"
SCHEMA_FILE = Path(__file__).parents[1] / "schemas" / "bundle-1.json"


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


class FileRecord(Record):
    bytes: Count
    sha256: Sha256


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
    def every_program(self) -> list[ProgramRecord]:
        """The programs that requests choose, then those with low-rank branches, then those of one pass."""
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
        for program in self.every_program:
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
        own = [file for each in self.every_program for file in (each.tables_file, each.subnet_file)]
        return {*self.tensors, *tokenizers, *own}

    def sealed(self) -> BundleRecord:
        """Return the record with its own checksum."""
        blank = self.model_copy(update={"sha256": ""})
        return blank.model_copy(update={"sha256": sha256_of_json(blank.model_dump(mode="json", by_alias=True))})


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema that is published as ``export/schemas/bundle-1.json``."""
    return BundleRecord.model_json_schema(by_alias=True)
