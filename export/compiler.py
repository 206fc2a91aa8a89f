"""The compiler: a traced model is converted once (:func:`prepare`), then any SubNet is written as a bundle."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import onnx_ir as ir
import torch
from safetensors.numpy import save_file

from dipgo.base.dtypes import PRECISIONS, Dtype
from dipgo.base.errors import DipgoError, DipgoWarning, UsageError
from dipgo.base.files import sha256_of
from dipgo.graph.trace import Trace, trace
from dipgo.model.models import Model
from dipgo.model.sampler import Sampler
from dipgo.schedule.subnet import SubNet, save_subnet
from export.assembly import assemble
from export.bundle import (
    RECORD_FILE,
    BundleRecord,
    FileRecord,
    ProgramRecord,
    TensorRecord,
)
from export.bundle_writer import check_delivery, check_weights, deliver
from export.component_weights import weights_in_place
from export.components import components_of, left_out
from export.config import ExportConfig
from export.converted import Prepared, prepare
from export.onnx import constants
from export.plan.launches import LATENT
from export.plan.merge import merged
from export.sizes import pixels_of_cell, sizes_for

TABLES_FILE = "tables.safetensors"
SUBNET_FILE = "subnet.json"


def check_model(subnet: SubNet, model: Model) -> None:
    """Refuse a SubNet that was searched on another model.

    Raises:
        DipgoError: class, configuration or weights differ.
    """
    identity = model.identity()
    for what, mine, theirs in (
        ("class", subnet.model.class_name, identity.class_name),
        ("configuration", subnet.model.config_sha256, identity.config_sha256),
        ("weights", subnet.model.weights_sha256, identity.weights_sha256),
    ):
        if mine is not None and mine != theirs:
            raise DipgoError(
                f"the SubNet belongs to '{subnet.model.name}': its {what} ({mine[:32]}) is not that of "
                f"'{identity.name}' ({str(theirs)[:32]}); give the right --model, or search again"
            )


@dataclass(frozen=True)
class Source:
    """What a program is compiled from."""

    prepared: Prepared
    subnet: SubNet
    sampler: Sampler

    def checked(self) -> Source:
        """Return the source with its SubNet in canonical form, after checking that its parts fit together.

        Raises:
            DipgoError: a mismatch of model, sampler or sites.
        """
        traced, subnet, sampler = self.prepared.trace, self.subnet, self.sampler
        check_model(subnet, traced.model)
        if [site.name for site in subnet.sites] != [site.name for site in traced.sites]:
            raise DipgoError("the SubNet's sites are not those that were traced; search again")
        if [float(t) for t in subnet.sampler.timesteps] != list(sampler.timesteps):
            raise DipgoError(
                f"the SubNet's {len(subnet.sampler.timesteps)} timesteps are not those of {sampler.steps} steps of "
                f"{sampler.name}, which has {sampler.calls}; search again"
            )
        return replace(self, subnet=normalise(subnet, traced))


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
    graphs that are equal.

    Raises:
        DipgoError, UsageError: a mismatch of model, sampler or sites, or an existing folder without ``force``.
    """
    traced, conditioning = prepared.trace, prepared.conditioning
    sources = [source.checked() for source in (Source(prepared, subnet, sampler), *further)]
    if config.max_graphs is not None:
        sources = [
            replace(each, subnet=merged(each.subnet, each.prepared.trace, config.max_graphs)) for each in sources
        ]
    made = [assemble(each.prepared, each.subnet, each.sampler, config.graphs) for each in sources]
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
            further=programs[1:],
            decoder=prepared.decoder,
            weights=config.weights,
            files=files,
            versions={name: version(name) for name in ("dipgo", "torch", "diffusers", "onnx", "onnxscript", "onnx-ir")},
        ).sealed()
        (draft / RECORD_FILE).write_text(record.text())
    return record


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
    check_delivery(Path(folder), model.folder, config.weights, force, (TABLES_FILE, SUBNET_FILE))
    if config.weights == "in-place":
        for name in (model.family.component, *(components_of(model) if whole else ())):
            check_weights(weights_in_place(model, name, dtype), model.folder)
    for each in subnets:
        check_model(each, model)
    check_together(subnets)
    if whole:
        for line in left_out(model):
            warnings.warn(line, DipgoWarning, stacklevel=2)
    model = model.at(first.sampler.guidance, first.sampler.pixels)
    sizes = sizes_for(model, config.batch, config.size)
    own = sizes.image == model.family.latent(model.config)
    prepared: dict[str, Prepared] = {}

    def source(subnet: SubNet) -> Source:
        sites = sites_of(subnet)
        if sites not in prepared:
            size = None if own else sizes.latent_at("opt")[2:]
            traced = trace(model, sites, first.sampler.guidance, dtype, size, open_guidance=True)
            prepared[sites] = prepare(traced, whole=whole and not prepared, sizes=sizes)
        return Source(prepared[sites], subnet, sampler_of(subnet, model))

    main, further = source(first), [source(each) for each in others]
    return write_bundle(main.prepared, first, main.sampler, Path(folder), force, config, further)


def check_together(subnets: Sequence[SubNet]) -> None:
    """Refuse SubNets that cannot be programs of one bundle.

    Raises:
        UsageError: of other image sizes, with another number of passes of guidance, or alike in steps and budget.
    """
    first, seen = subnets[0], list[tuple[int, float]]()
    for number, subnet in enumerate(subnets, 1):
        sampler, which = subnet.sampler, f"SubNet {number} of {len(subnets)}"
        if sampler.pixels != first.sampler.pixels:
            raise UsageError(f"{which} is for images of another size than the first; export it on its own")
        passes = [each.guidance_scale > 1 for each in (first.sampler, sampler)]
        if passes[0] != passes[1] or (sampler.guidance_rescale > 0) != (first.sampler.guidance_rescale > 0):
            raise UsageError(
                f"{which} has other passes of guidance, or another rescale, than the first; export it on its own"
            )
        if any(steps == sampler.steps and abs(ratio - subnet.cost.ratio) < 0.005 for steps, ratio in seen):
            raise UsageError(
                f"{which} has the steps and the budget of one before it ({sampler.steps}, {subnet.cost.ratio:.1%}), "
                "and requests could not tell them apart; leave it out"
            )
        seen.append((sampler.steps, subnet.cost.ratio))


def sampler_of(subnet: SubNet, model: Model) -> Sampler:
    """Return the sampler that a SubNet was searched for, as a table."""
    return model.at(subnet.sampler.guidance, subnet.sampler.pixels).family.table(
        scheduler_of(subnet), subnet.sampler.steps
    )


def scheduler_of(subnet: SubNet) -> Any:
    """Return the diffusers scheduler that a SubNet was searched for."""
    import diffusers

    scheduler_class = getattr(diffusers, subnet.sampler.class_name, None)
    if scheduler_class is None:
        raise DipgoError(
            f"the installed diffusers has no {subnet.sampler.class_name}; install the version it came from"
        )
    try:
        return scheduler_class.from_config(subnet.sampler.config)
    except Exception as error:  # whatever a constructor says of its arguments
        raise DipgoError(
            f"the SubNet's {subnet.sampler.class_name} cannot be made of its configuration ({error}); search again"
        ) from error


def normalise(subnet: SubNet, traced: Trace) -> SubNet:
    """Return the canonical form: dead gates off, weights of missing outputs zero, cost as the graph has it."""
    return subnet.under(subnet.schedule.canonical(traced), traced)


def sites_of(subnet: SubNet) -> str:
    """Return the site spec that traces exactly a SubNet's sites."""
    return ",".join(site.name for site in subnet.sites)


def retrace(model: Model, subnet: SubNet, dtype: torch.dtype = torch.float32, open_guidance: bool = False) -> Trace:
    """Trace ``model`` with the SubNet's sites and guidance; all else as :func:`dipgo.graph.trace.trace` has it."""
    return trace(model, sites_of(subnet), subnet.sampler.guidance, dtype, open_guidance=open_guidance)
