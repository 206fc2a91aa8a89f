"""The compiler: a traced model is converted once (:func:`prepare`), then any SubNet is written as a bundle."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import onnx_ir as ir
from safetensors.numpy import save_file

from dipgo.base.dtypes import PRECISIONS, Dtype
from dipgo.base.errors import DipgoWarning
from dipgo.base.files import sha256_of
from dipgo.graph.trace import trace
from dipgo.model.families.pictures import check_takes_pictures
from dipgo.model.models import Model
from dipgo.model.sampler import Sampler
from dipgo.schedule.subnet import SubNet, save_subnet
from export.assembly import assemble
from export.bundle import RECORD_FILE
from export.bundle_writer import check_delivery, check_weights, deliver
from export.component_weights import weights_in_place
from export.components import components_of, left_out
from export.config import ExportConfig
from export.converted import Prepared, prepare
from export.onnx import constants
from export.onnx.convert import tensor_record
from export.plan.launches import LATENT
from export.plan.merge import merged
from export.records.bundle import AdaptersRecord, BundleRecord, FileRecord, UnguidedRecord
from export.records.graphs import TensorRecord
from export.records.program import ProgramRecord
from export.sizes import pixels_of_cell, sizes_for
from export.sources import (
    Source,
    check_model,
    check_together,
    check_unguided,
    sampler_of,
    sites_of,
    without_guidance,
)

TABLES_FILE = "tables.safetensors"
SUBNET_FILE = "subnet.json"


def write_bundle(
    prepared: Prepared,
    subnet: SubNet,
    sampler: Sampler,
    folder: Path,
    force: bool = False,
    config: ExportConfig = ExportConfig(),
    further: Sequence[Source] = (),
) -> BundleRecord:
    """Compile ``subnet`` into ``folder``: lay out the launches, cut the graphs, allocate slots, write the program.

    The bundle's own SubNet is the canonical form of the given one (nothing computed for nobody), which does the same,
    or, with ``max_graphs``, what came of merging signatures. ``further`` become programs that share weights and all
    graphs that are equal. Where the model is prepared with the conditional pass alone too, so is each program.

    Raises:
        DipgoError, UsageError: a mismatch of model, sampler or sites, or an existing folder without ``force``.
    """
    traced, conditioning = prepared.trace, prepared.conditioning
    sources = [source.checked() for source in (Source(prepared, subnet, sampler), *further)]
    if config.max_graphs is not None:
        sources = [
            replace(each, subnet=merged(each.subnet, each.prepared.trace, config.max_graphs)) for each in sources
        ]
    count = len(sources)
    unguided = [without_guidance(each, each.prepared.alone).checked() for each in sources if each.prepared.alone]
    if config.lora_rank:
        branched = {id(each.prepared): each.prepared.with_branches(config.lora_rank) for each in sources}
        sources += [replace(each, prepared=branched[id(each.prepared)]) for each in sources]
    sources += unguided
    made = [
        assemble(each.prepared, each.subnet, each.sampler, config.graphs, each.starts if config.image else None)
        for each in sources
    ]
    with deliver(folder, prepared.weights, traced.model.folder, config.weights, force) as (draft, files):
        models = {file: model for each in made for file, model in each.models.items()} | dict(prepared.extra)
        with constants.outside(models.values(), draft):
            for file, model in models.items():
                _save(model, draft / file)
        for file, content in prepared.tokenizers.items():
            (draft / file).write_bytes(content)
        programs = []
        for number, each in enumerate(made):
            record = each.record(_numbered(TABLES_FILE, number), _numbered(SUBNET_FILE, number))
            save_subnet(each.subnet, draft / record.subnet_file)
            save_file(each.tables, draft / record.tables_file)
            programs.append(record)
        written = [path for path in sorted(draft.iterdir()) if path.is_file()]
        for path in written:
            path.chmod(0o644)  # safetensors writes for the owner alone, and a server is somebody else
            files[path.name] = FileRecord(bytes=path.stat().st_size, sha256=sha256_of(path))
        record = BundleRecord(
            **{name: getattr(programs[0], name) for name in ProgramRecord.model_fields},
            model=subnet.model,
            random_weights=traced.model.random_weights,
            dtype=cast(Any, Dtype.of_torch(traced.dtype).value),
            layout=config.graphs,
            latent=TensorRecord(name=LATENT, dtype="float32", shape=prepared.sizes.latent),
            axes=prepared.sizes.axes,
            cell=pixels_of_cell(traced.model),
            pixels=traced.model.family.pixels,
            noise=traced.model.family.noise,
            conditioning=conditioning,
            graphs={name: graph for each in made for name, graph in each.graphs.items()},
            further=programs[1:count],
            adapters=_adapters(sources[count].prepared, programs[count : 2 * count]) if config.lora_rank else None,
            unguided=_unguided(unguided[0].prepared, programs[-count:]) if unguided else None,
            decoder=prepared.decoder,
            encoder=prepared.encoder,
            weights=config.weights,
            files=files,
            versions={name: version(name) for name in ("dipgo", "torch", "diffusers", "onnx", "onnxscript", "onnx-ir")},
        ).sealed()
        (draft / RECORD_FILE).write_text(record.text())
    return record


def _unguided(prepared: Prepared, programs: list[ProgramRecord]) -> UnguidedRecord:
    """Return the programs of the conditional pass alone, and what they take."""
    own = prepared.conditioning
    return UnguidedRecord(inputs=own.inputs, fixed=own.fixed, programs=programs)


def _adapters(prepared: Prepared, programs: list[ProgramRecord]) -> AdaptersRecord:
    """Return how requests bring LoRAs, of a model with branches."""
    denoiser = prepared.denoiser
    inputs = [tensor_record(value) for value in denoiser.model.graph.inputs if value.name in denoiser.matrices]
    return AdaptersRecord(rank=denoiser.rank, inputs=inputs, branches=list(denoiser.branches), programs=programs)


def _numbered(file: str, number: int) -> str:
    """Return the name of a program's own file: the first program's as it is, the second's with -2."""
    stem, suffix = file.rsplit(".", 1)
    return f"{stem}-{number + 1}.{suffix}" if number else file


def _save(model: ir.Model, path: Path) -> None:
    """Save a graph without the shapes of what lies inside it: half its size, and every runtime infers them.

    Weights are in order of name, so that the same graph is the same file.
    """
    proto = ir.to_proto(model)
    proto.graph.ClearField("value_info")
    proto.graph.initializer.sort(key=lambda tensor: tensor.name)
    path.write_bytes(proto.SerializeToString())


def compile_subnet(
    subnet: SubNet | Sequence[SubNet],
    model: Model,
    folder: str | Path,
    config: ExportConfig = ExportConfig(),
    force: bool = False,
) -> BundleRecord:
    """Compile a SubNet for ``model`` from nothing: trace, convert, write the bundle (see :func:`write_bundle`).

    Several SubNets become several programs; requests get the first by default.

    Raises:
        UsageError: a size that the model does not take, an architecture without weights, a folder that cannot take the
            bundle, SubNets that no request could tell apart.
        DipgoError: see :func:`write_bundle`; what cannot be traced or converted.
    """
    model.require_weights()
    first, *others = subnets = [subnet] if isinstance(subnet, SubNet) else list(subnet)
    dtype, whole = PRECISIONS[config.dtype].torch, config.pipeline
    names = [
        _numbered(file, number)
        for file in (TABLES_FILE, SUBNET_FILE)
        for number in range(len(subnets) * (1 + (config.lora_rank > 0) + config.unguided))
    ]
    check_delivery(Path(folder), model.folder, config.weights, force, names)
    if config.weights == "in-place":
        for name in (model.family.component, *(components_of(model) if whole else ())):
            check_weights(weights_in_place(model, name, dtype), model.folder)
    for each in subnets:
        check_model(each, model)
        if config.unguided:
            check_unguided(model, each)
    check_together(subnets)
    if config.image:
        check_takes_pictures(model.folder)
    if whole:
        for line in left_out(model):
            warnings.warn(line, DipgoWarning, stacklevel=2)
    model = model.at(first.sampler.guidance, first.sampler.pixels)
    sizes = sizes_for(model, config.batch, config.size)
    own = sizes.image == model.family.latent(model.config)
    prepared: dict[str, Prepared] = {}

    def source(subnet: SubNet) -> Source:
        sites, size = sites_of(subnet), None if own else sizes.latent_at("opt")[2:]
        if sites not in prepared:
            traced = trace(model, sites, first.sampler.guidance, dtype, size, open_guidance=True)
            prepared[sites] = prepare(traced, 1, whole and not prepared, sizes, config.image)
            if config.unguided:
                alone = trace(model.at(1.0, first.sampler.pixels), sites, 1.0, dtype, size)
                prepared[sites] = prepared[sites].with_one_pass(alone)
        return Source(prepared[sites], subnet, sampler_of(subnet, model))

    main, further = source(first), [source(each) for each in others]
    return write_bundle(main.prepared, first, main.sampler, Path(folder), force, config, further)
