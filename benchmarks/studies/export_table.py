"""What it takes to export real architectures: seconds, peak memory, sizes; and what leaves the loop.

    python -m benchmarks.studies.export_table -o benchmarks/results/export.json
    python -m benchmarks.results    the tables into their page of docs/results/

Each case is a process of its own: it exports the denoiser from a pipeline folder on disk, which is made first and holds
random weights in the graph's precision. The SubNet is the published one for SD-1.5, else whole steps at even intervals.
Linux and macOS.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from argparse import SUPPRESS
from dataclasses import replace
from itertools import product
from pathlib import Path

from tqdm import tqdm

from benchmarks.studies.study import Study, StudyRecord, Words, run
from dipgo.base.dtypes import PRECISIONS
from dipgo.base.errors import DipgoError
from dipgo.base.process_memory import resident_peak
from dipgo.base.records import Record
from dipgo.model.models import ARCHITECTURES, Model, find_model
from dipgo.schedule.subnet import SubNet, load_subnet, save_subnet
from export.records.bundle import BundleRecord
from export.records.program import PartRecord

ROOT = Path(__file__).parents[2]
SCRATCH = ROOT / "build"  # not the system's folder for such: it may be memory, and checkpoints are gigabytes
PUBLISHED = ROOT / "dipgo" / "published" / "sd15-published-0.8.json"
MODELS = ("sd-1.5", "sd-2.1", "sdxl", "dit-xl-2", "pixart-alpha")
STEPS, RATIO = 50, 0.35


class Case(Record):
    """One export. Seconds are of the whole process, and of the first and of each further graph inside it."""

    model: str
    weights: str
    dtype: str
    parameters: int
    seconds: float
    seconds_first_graph: float
    seconds_further_graph: float
    peak_bytes: int
    graphs: int
    largest_graph_bytes: int
    graphs_bytes: int
    copied_bytes: int
    weights_bytes: int
    slots_bytes: int
    naive_cache_bytes: int
    parts: list[PartRecord]


class ExportRecord(StudyRecord):
    """The result file."""

    cases: list[Case]


def make_checkpoint(name: str, dtype: str, folder: Path) -> Path:
    """Write a pipeline folder of an architecture's denoiser with random weights; returns it."""
    from dipgo.model.random_weights import write_random
    from export.components import parameters_of

    model = find_model(name, random_weights=True)
    target = folder / name
    shutil.copytree(ARCHITECTURES / name, target, dirs_exist_ok=True)
    component = model.family.component
    path = target / component / "diffusion_pytorch_model.safetensors"
    write_random(parameters_of(model, component), PRECISIONS[dtype], path)
    return target


def subnet_of(model: Model) -> SubNet:
    """Return the SubNet to export: the published one where there is one, else whole steps at even intervals."""
    from dipgo.graph.trace import trace
    from dipgo.model.sampler import make_scheduler, tabulate
    from dipgo.schedule.fixed_schedules import Rule, spaced
    from dipgo.schedule.search_record import SearchRecord
    from dipgo.schedule.subnet import make_subnet

    if model.folder.name == "sd-1.5":
        return replace(load_subnet(PUBLISHED), model=model.identity())
    import diffusers

    scale = model.default_guidance
    traced = trace(model, "block", scale)
    sampler = tabulate(make_scheduler("ddim", diffusers.DDIMScheduler(clip_sample=False)), STEPS)
    schedule = spaced(traced.macs, sampler.calls, RATIO, Rule())
    return make_subnet(traced, sampler.identity(scale), schedule, SearchRecord())


def export_one(folder: Path, subnet: Path, dtype: str, weights: str, output: Path) -> dict[str, float]:
    """Export in this process; returns the figures of a case that only it can know.

    A further graph is timed by putting the program together again, when all that graphs share is at hand.
    """
    import onnx_ir as ir

    from export.assembly import assemble
    from export.compiler import write_bundle
    from export.config import ExportConfig
    from export.converted import prepare
    from export.sources import normalise, retrace, sampler_of

    started = time.perf_counter()
    model, loaded = find_model(str(folder)), load_subnet(subnet)
    prepared = prepare(retrace(model, loaded, PRECISIONS[dtype].torch), whole=False)
    sampler = sampler_of(loaded, model)
    write_bundle(prepared, loaded, sampler, output, True, ExportConfig(weights=weights))
    total = time.perf_counter() - started
    peak = resident_peak()
    started = time.perf_counter()
    assembled = assemble(prepared, normalise(loaded, prepared.trace), sampler, "signature")
    for graph in assembled.models.values():
        ir.to_proto(graph).SerializeToString()
    further = (time.perf_counter() - started) / len(assembled.models)
    first = total - further * (len(assembled.graphs) - 1)
    times = {"seconds_first_graph": round(first, 2), "seconds_further_graph": round(further, 3)}
    return times | {"peak_bytes": int(peak)}


def measure(study: Study, folder: Path, subnet: Path, dtype: str, weights: str) -> Case:
    """Export in a process of its own and describe the bundle."""
    output = folder if weights == "in-place" else folder.parent / "bundle"
    started = time.perf_counter()
    try:
        inside = study.alone("--one", folder, subnet, dtype, weights, "-o", output)
    except DipgoError as error:
        raise DipgoError(f"export of {folder.name} failed: {error}") from error
    seconds = time.perf_counter() - started
    record = BundleRecord.model_validate_json((output / "bundle.json").read_text())
    graphs = [record.files[graph.file].bytes for graph in record.graphs.values()]
    stored_bytes = sum(file.bytes for name, file in record.files.items() if "/" in name)
    case = Case(
        model=folder.name,
        weights=weights,
        dtype=dtype,
        parameters=sum(part.parameters for part in record.parts),
        seconds=round(seconds, 1),
        graphs=len(graphs),
        largest_graph_bytes=max(graphs),
        graphs_bytes=sum(graphs),
        copied_bytes=stored_bytes if weights == "copy" else 0,
        weights_bytes=stored_bytes,
        slots_bytes=sum(slot.bytes for slot in record.slots),
        naive_cache_bytes=record.naive_cache_bytes,
        parts=record.parts,
        **inside,
    )
    if weights == "copy":
        shutil.rmtree(output)
    return case


def markdown(record: ExportRecord, source: str) -> str:
    """Return two tables: what each export took, and where parameters and MACs went."""
    lines = [
        "| denoiser, precision | weights | wall time | peak memory | graphs | largest | each further graph | copied |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in record.cases:
        further = f"{case.seconds_further_graph:.2f} s ({case.seconds_further_graph / case.seconds_first_graph:.1%})"
        lines.append(
            f"| {case.model}, {case.dtype}, {case.parameters / 1e6:.0f} M | {case.weights} | {case.seconds:.0f} s | "
            f"{case.peak_bytes / 1e9:.2f} GB | {case.graphs} | {case.largest_graph_bytes / 1e3:.0f} KB | {further} | "
            f"{case.copied_bytes / 1e9:.2f} GB |"
        )
    lines += [
        "",
        "| denoiser | parameters in the loop | before it, once | while compiling | cache slots | all sites kept |",
        "|---|---|---|---|---|---|",
    ]
    for model in dict.fromkeys(case.model for case in record.cases):
        case = next(case for case in record.cases if case.model == model)
        sizes = {part.part: part.parameters / case.parameters for part in case.parts}
        lines.append(
            f"| {model} | {sizes['loop']:.1%} | {sizes['steps'] + sizes['prompt']:.1%} | {sizes['table']:.1%} | "
            f"{case.slots_bytes / 1e6:.1f} MB | {case.naive_cache_bytes / 1e6:.1f} MB |"
        )
    place = record.environment
    lines += [
        "",
        f"`{record.command}`; {place.cpu}, {place.cores} cores, load average {place.load_at_start[0]:.1f} at the "
        f"start. From [{source}]({source}).",
    ]
    return "\n".join(lines)


def main(words: Words | None = None) -> None:
    study = Study("export_table", __doc__, words)
    study.parser.add_argument("--models", default=",".join(MODELS), help="joined by commas")
    study.parser.add_argument("--dtypes", default="fp16", help="joined by commas")
    study.parser.add_argument("--one", nargs=4, metavar=("FOLDER", "SUBNET", "DTYPE", "WEIGHTS"), help=SUPPRESS)
    options = study.options()
    if options.one:
        folder, subnet, dtype, weights = options.one
        print(json.dumps(export_one(Path(folder), Path(subnet), dtype, weights, options.output)))
        return
    cases = []
    SCRATCH.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="export-", dir=SCRATCH) as scratch:
        for name, dtype in tqdm([*product(options.models.split(","), options.dtypes.split(","))], desc="export"):
            checkpoint = make_checkpoint(name, dtype, Path(scratch))
            subnet = Path(scratch) / f"{name}.subnet.json"
            save_subnet(subnet_of(find_model(str(checkpoint))), subnet, force=True)
            cases += [measure(study, checkpoint, subnet, dtype, weights) for weights in ("copy", "in-place")]
            shutil.rmtree(checkpoint)
    record = ExportRecord(cases=cases, **study.origin())
    study.write(record)
    print(markdown(record, str(options.output)))


if __name__ == "__main__":
    run(main)
