"""The compiler: a traced model is converted once (:func:`prepare`), then any SubNet is written as a bundle."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from dipgo.cost import cost_of, is_silent
from dipgo.errors import DipgoError
from dipgo.files import new_folder, sha256_of, sha256_of_json
from dipgo.liveness import StepPlan, canonical, plan
from dipgo.models import Model
from dipgo.sampler import Sampler, tabulate
from dipgo.subnet import SubNet, save_subnet
from dipgo.trace import Trace, trace
from export.bundle import (
    RECORD_FILE,
    BundleRecord,
    ConditioningRecord,
    FileRecord,
    GraphRecord,
    SolverRecord,
    StepRecord,
    TensorRecord,
)
from export.cut import Cut, cut
from export.decoder import FILE as DECODER_FILE
from export.decoder import decoder_record, decoder_to_onnx
from export.prologue import PROMPT, STEPS, Prologue, cut_prologue, hoisted_values
from export.slots import allocate, naive_bytes
from export.tapped import Tapped, to_onnx

WEIGHTS_FILE = "weights.safetensors"


@dataclass(frozen=True)
class Prepared:
    """Everything about a model that does not depend on the SubNet: converted once, written into many bundles."""

    tapped: Tapped
    hoisted: dict[str, str]
    decoder: ir.Model
    conditioning: ConditioningRecord

    @property
    def trace(self) -> Trace:
        return self.tapped.trace


def prepare(traced: Trace, pipe: Any, batch: int = 1) -> Prepared:
    """Convert a traced denoiser and its pipeline's VAE decoder to ONNX."""
    model = traced.model
    latent_shape = model.latent_shape(batch)
    tapped = to_onnx(traced, batch)
    guided = traced.guidance_scale > 1
    rows = batch * traced.rows
    inputs = [
        TensorRecord(name=name, dtype=str(value.numpy().dtype), shape=list(value.shape))
        for name, value in model.family.example(model.config, rows).items()
    ]
    conditioning = ConditioningRecord(
        kind=model.family.conditioned_by,
        guided=guided,
        inputs=inputs,
        null_class=model.family.null_class,
        labels=model.family.labels(pipe),
    )
    return Prepared(tapped, hoisted_values(tapped), decoder_to_onnx(pipe.vae, latent_shape), conditioning)


def check_same_model(subnet: SubNet, traced: Trace) -> None:
    """Refuse a SubNet that was searched on another model.

    Raises:
        DipgoError: class, configuration, weights, sites or guidance differ.
    """
    identity = traced.model.identity()
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
    if [site.name for site in subnet.sites] != [site.name for site in traced.sites]:
        raise DipgoError("the SubNet's sites are not those that were traced; search again")


def write_bundle(prepared: Prepared, subnet: SubNet, sampler: Sampler, folder: Path, force: bool = False) -> None:
    """Compile ``subnet`` into ``folder``: cut one graph a signature, allocate slots, write the program.

    The bundle's own SubNet is the canonical form of the given one (nothing computed for nobody), which does the same.

    Raises:
        DipgoError, UsageError: a mismatch of model, sampler or sites, or an existing folder without ``force``.
    """
    traced = prepared.trace
    check_same_model(subnet, traced)
    if [float(t) for t in subnet.sampler.timesteps] != list(sampler.timesteps):
        raise DipgoError(
            f"the SubNet's {len(subnet.sampler.timesteps)} timesteps are not those of {sampler.steps} steps of "
            f"{sampler.name}, which has {sampler.calls}; search again"
        )
    subnet = normalise(subnet, traced)
    learned = bool(subnet.weights)
    plans = plan(subnet.gates, subnet.terms, traced.live_sites)
    silent = [step > 0 and is_silent(traced, row, learned) for step, row in enumerate(subnet.gates)]
    cuts = _cuts(prepared, subnet, plans, silent)
    prologues = _prologues(prepared, cuts, subnet.calls)
    tensors = _feature_tensors(traced, prepared.tapped.batch)
    allocation = allocate(plans, tensors)

    with new_folder(folder, force) as draft:
        shutil.copyfile(prepared.tapped.weights_file, draft / WEIGHTS_FILE)
        save_subnet(subnet, draft / "subnet.json")
        graphs = {}
        for signature, part in cuts.items():
            file = _save(part.model, draft)
            macs = traced.macs(np.array([bit == "1" for bit in signature]))
            graphs[part.model.graph.name] = GraphRecord(
                file=file,
                signature=signature,
                macs=macs,
                inputs=part.inputs,
                outputs=part.outputs,
                coefficients=part.coefficients,
            )
        records = [part.record.model_copy(update={"file": _save(part.model, draft)}) for part in prologues]
        ir.save(prepared.decoder, draft / DECODER_FILE)
        record = BundleRecord(
            model=subnet.model,
            sampler=subnet.sampler,
            latent=TensorRecord(
                name="latent", dtype="float32", shape=list(traced.model.latent_shape(prepared.tapped.batch))
            ),
            conditioning=prepared.conditioning,
            solver=SolverRecord(input_scale=sampler.input_scale.tolist(), rows=sampler.rows.tolist()),
            prologues=records,
            graphs=graphs,
            slots=allocation.slots,
            steps=[
                _step(
                    step, subnet, entry, None if silent[step] else cuts[_signature(entry, subnet)], allocation.slot_of
                )
                for step, entry in enumerate(plans)
            ],
            weights_file=WEIGHTS_FILE,
            backups_file="subnet.safetensors" if learned else None,
            decoder=decoder_record(prepared.decoder),
            subnet_file="subnet.json",
            macs=subnet.cost.subnet,
            naive_cache_bytes=naive_bytes(tensors, subnet.terms),
            files={
                path.name: FileRecord(bytes=path.stat().st_size, sha256=sha256_of(path))
                for path in sorted(draft.iterdir())
            },
            versions={name: version(name) for name in ("dipgo", "torch", "diffusers", "onnx", "onnxscript", "onnx-ir")},
        )
        (draft / RECORD_FILE).write_text(record.sealed().text())


def compile_subnet(subnet: SubNet, model: Model, folder: str | Path, force: bool = False) -> None:
    """Compile a SubNet for ``model`` from nothing: trace, convert, write the bundle (see :func:`write_bundle`)."""
    traced = retrace(model, subnet)
    check_same_model(subnet, traced)
    pipe = model.pipeline()
    sampler = tabulate(scheduler_of(subnet), subnet.sampler.steps, model.family.scales_noise)
    write_bundle(prepare(traced, pipe), subnet, sampler, Path(folder), force)


def scheduler_of(subnet: SubNet) -> Any:
    """Return the diffusers scheduler that a SubNet was searched for."""
    import diffusers

    scheduler_class = getattr(diffusers, subnet.sampler.class_name, None)
    if scheduler_class is None:
        raise DipgoError(
            f"the installed diffusers has no {subnet.sampler.class_name}; install the version it came from"
        )
    return scheduler_class.from_config(subnet.sampler.config)


def normalise(subnet: SubNet, traced: Trace) -> SubNet:
    """Return the canonical form: dead gates off, weights of missing terms zero, cost as the graph has it."""
    gates = canonical(subnet.gates, subnet.terms, traced.live_sites)
    weights = {name: array.copy() for name, array in subnet.weights.items()}
    computed_before = np.cumsum(gates, axis=0) - gates
    for index, site in enumerate(subnet.sites):
        for output in range(len(traced.outputs[index])):
            array = weights.get(f"backup.{site.name}" + (f"#{output}" if output else ""))
            if array is not None:
                for term in range(subnet.terms):
                    array[computed_before[:, index] <= term, term] = 0
    return replace(subnet, gates=gates, weights=weights, cost=cost_of(traced, gates, bool(weights)))


def _signature(entry: StepPlan, subnet: SubNet) -> str:
    return "".join("1" if site in entry.computed else "0" for site in range(len(subnet.sites)))


def _prologues(prepared: Prepared, cuts: dict[str, Cut], calls: int) -> list[Prologue]:
    """Cut the prologues that compute what the step graphs read."""
    read = {tensor.name for part in cuts.values() for tensor in part.inputs}
    parts = []
    for kind in (STEPS, PROMPT):
        names = [name for name, binding in prepared.hoisted.items() if binding == kind and name in read]
        part = cut_prologue(prepared.tapped, kind, names, calls)
        if part is not None:
            part.model.graph.name = f"{_stem(prepared.trace.model.name)}-{kind}-fp32-{calls}"
            parts.append(part)
    return parts


def _stem(name: str) -> str:
    """Return a model's name as the start of its graphs' names."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", Path(name).name).strip("-") or "denoiser"


def _save(model: ir.Model, folder: Path) -> str:
    """Save a graph whose weights point into the bundle's own file; return its name."""
    _point_weights(model, folder)
    file = f"{model.graph.name}.onnx"
    ir.save(model, folder / file)
    return file


def _cuts(prepared: Prepared, subnet: SubNet, plans: Sequence[StepPlan], silent: Sequence[bool]) -> dict[str, Cut]:
    """Cut one graph a distinct signature; it hands out what any of its steps stores."""
    tapped = prepared.tapped
    stored: dict[str, set[int]] = {}
    for entry, nothing in zip(plans, silent, strict=True):
        if not nothing:
            stored.setdefault(_signature(entry, subnet), set()).update(entry.stored)
    backups = dict(subnet.weights)
    shape = "x".join(str(size) for size in tapped.trace.model.latent_shape(tapped.batch))
    stem = _stem(subnet.model.name)
    cuts = {}
    for signature, features in stored.items():
        computed = {site for site, bit in enumerate(signature) if bit == "1"}
        key = sha256_of_json([signature, sorted(features), {k: v.shape[1:] for k, v in backups.items()}])[:8]
        cuts[signature] = cut(tapped, f"{stem}-{key}-fp32-{shape}", computed, features, backups, prepared.hoisted)
    return cuts


def _step(
    step: int, subnet: SubNet, entry: StepPlan, part: Cut | None, slot_of: dict[tuple[int, int, int], int]
) -> StepRecord:
    timestep = subnet.sampler.timesteps[step]
    if part is None:
        return StepRecord(timestep=timestep, graph=None, reads={}, writes={})
    reads = {}
    for name, (site, output, term) in part.caches.items():
        sources = entry.served[site]
        reads[name] = slot_of[sources[min(term, len(sources) - 1)], site, output]  # a missing term has weight 0
    writes = {name: slot_of[step, *key] for name, key in part.features.items() if (step, *key) in slot_of}
    return StepRecord(timestep=timestep, graph=part.model.graph.name, reads=reads, writes=writes)


def _feature_tensors(traced: Trace, batch: int) -> list[list[TensorRecord]]:
    values = {node.name: node.meta.get("val") for node in traced.program.graph_module.graph.nodes}

    def record(name: str) -> TensorRecord:
        dtype = str(values[name].dtype).removeprefix("torch.")
        return TensorRecord(name=name, dtype=dtype, shape=traced.shape(name, batch))

    return [[record(name) for name in names] for names in traced.outputs]


def _point_weights(model: ir.Model, folder: Path) -> None:
    """Point the graph's external initializers into the bundle's own copy of the weights."""
    for name, value in model.graph.initializers.items():
        held = value.const_value
        if isinstance(held, ir.ExternalTensor):
            value.const_value = ir.ExternalTensor(
                WEIGHTS_FILE, held.offset, held.length, held.dtype, shape=held.shape, name=name, base_dir=folder
            )


def sites_of(subnet: SubNet) -> str:
    """Return the site spec that traces exactly a SubNet's sites."""
    return ",".join(site.name for site in subnet.sites)


def retrace(model: Model, subnet: SubNet) -> Trace:
    """Trace ``model`` with the SubNet's sites and guidance."""
    return trace(model, sites_of(subnet), subnet.sampler.guidance_scale)
