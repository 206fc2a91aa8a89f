"""The command line. The only place that knows search, export, engines and benchmarks; each is imported where needed."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.exceptions import TyperException

from dipgo.errors import DipgoError

if TYPE_CHECKING:
    from dipgo.latency import LatencyProfile
    from dipgo.search.journal import Report
    from dipgo.search.task import Task
    from dipgo.subnet import SubNet
    from export.bundle import BundleRecord

app = typer.Typer(
    help="Search which blocks of a diffusion model to skip, compile what is left into static ONNX graphs, prove it, "
    "measure it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

INTERRUPTED = 130  # what typer makes of Ctrl-C

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Built-in name, diffusers folder, or hub id.")]
BundleArgument = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder written by 'dipgo export'.")]
OutputOption = Annotated[Path, typer.Option("--output", "-o", help="Where to write.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace an output that exists.")]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="Threads; all cores by default.")]
StepsOption = Annotated[int, typer.Option(help="Inference steps of the full trajectory.")]
BudgetOption = Annotated[float, typer.Option(help="Share of the full trajectory's MACs to keep, in (0, 1].")]
BudgetsOption = Annotated[
    str, typer.Option(help="The same, or several joined by commas: 0.5,0.35,0.25; each starts from the last.")
]
SamplerOption = Annotated[
    str | None,
    typer.Option(help="ddim, dpm++2m, euler, heun, pndm, unipc or a diffusers class; the model's own by default."),
]
SitesOption = Annotated[
    str | None,
    typer.Option(help="block, branch or layer, or module patterns joined by commas; the family's own by default."),
]
GuidanceOption = Annotated[float | None, typer.Option(help="Guidance scale; the pipeline's default by default.")]
CostOption = Annotated[
    str, typer.Option(help="What the budget is a share of: macs, latency (measured here), or a latency profile's file.")
]
MethodOption = Annotated[str, typer.Option(help="dipgo, or paper for the published procedure.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Change a setting of the search; may be given again."),
]
PromptsOption = Annotated[
    Path | None, typer.Option(help="Prompts to search on, one a line, UTF-8, where prompts condition the model.")
]
ClassesOption = Annotated[
    str | None, typer.Option(help="Classes to search on, joined by commas, or all, where classes condition the model.")
]
DeviceOption = Annotated[str, typer.Option(help="Where to search: cpu, or cuda where torch has it.")]
RunFolderOption = Annotated[
    Path | None, typer.Option(help="Keep checkpoints and figures of the search in this folder; see --resume.")
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on with the search in --run-folder.")]
TensorBoardOption = Annotated[bool, typer.Option("--tensorboard", help="Log for TensorBoard too, in --run-folder.")]
PresetOption = Annotated[str, typer.Option(help="default, or quick for a first look.")]
SeedOption = Annotated[int, typer.Option(min=0, help="Seed of everything that is drawn.")]
RandomWeightsOption = Annotated[
    bool, typer.Option("--random-weights", help="Draw the weights: for structure and speed, images are meaningless.")
]
BatchOption = Annotated[int, typer.Option(min=1, help="Images a call.")]
DtypeOption = Annotated[str, typer.Option(help="fp32, fp16 or bf16.")]
GraphsOption = Annotated[
    str, typer.Option(help="signature: one graph a set of computed sites; segment: every block in one graph; step.")
]
MaxGraphsOption = Annotated[
    int | None, typer.Option(min=1, help="Merge signatures down to as many, at the least added MACs.")
]
WeightsOption = Annotated[
    str, typer.Option(help="copy: a bundle of its own; in-place: graphs in the pipeline's folder, nothing copied.")
]
SourceOption = Annotated[
    str | None, typer.Option("--model", help="Where the model lies now, if not where it was searched.")
]


@app.command()
def models() -> None:
    """List what is built in and supported, with sites and MACs."""
    from dipgo.describe import families_text, model_text
    from dipgo.models import architectures, built_in, find_model

    for title, names in (("built in:", built_in()), ("architectures, without weights:", architectures())):
        typer.echo(title)
        for name in names:
            typer.echo(f"  {model_text(find_model(name))}")
        typer.echo()
    typer.echo(families_text())


@app.command()
def search(
    model: ModelArgument,
    steps: StepsOption,
    budget: BudgetsOption,
    output: OutputOption,
    sampler: SamplerOption = None,
    sites: SitesOption = None,
    guidance: GuidanceOption = None,
    cost: CostOption = "macs",
    method: MethodOption = "dipgo",
    preset: PresetOption = "default",
    settings: SetOption = None,
    prompts: PromptsOption = None,
    classes: ClassesOption = None,
    device: DeviceOption = "cpu",
    seed: SeedOption = 0,
    run_folder: RunFolderOption = None,
    resume: ResumeOption = False,
    tensorboard: TensorBoardOption = False,
    threads: ThreadsOption = None,
    random_weights: RandomWeightsOption = False,
    force: ForceOption = False,
) -> None:
    """Search a SubNet and write it to a JSON file; with several budgets one each, into a folder with a Pareto plot."""
    _search(locals())


@app.command(name="import")
def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What others publish; see docs/formats.md.")],
    output: OutputOption,
    model: Annotated[str | None, typer.Option(help="Name, folder or hub id; what the file was published for.")] = None,
    steps: Annotated[int | None, typer.Option(min=2, help="Inference steps; the file's own by default.")] = None,
    sampler: SamplerOption = None,
    sites: SitesOption = None,
    guidance: GuidanceOption = None,
    force: ForceOption = False,
) -> None:
    """Read DiP-GO gates, DeepCache settings, a step mask or a SmoothCache schedule into a SubNet."""
    from dipgo.files import refuse_existing
    from dipgo.imports.importer import import_subnet, summary
    from dipgo.subnet import save_subnet

    refuse_existing(output, force)
    with _spinner("read and trace"):
        subnet = import_subnet(file, model, steps, sampler, sites, guidance)
    save_subnet(subnet, output, force)
    typer.echo(f"SubNet: {output}, {summary(subnet)}")


@app.command()
def export(
    subnet: Annotated[Path, typer.Argument(metavar="SUBNET", help="JSON file written by 'dipgo search'.")],
    output: OutputOption,
    model: SourceOption = None,
    graphs: GraphsOption = "signature",
    max_graphs: MaxGraphsOption = None,
    dtype: DtypeOption = "fp32",
    batch: BatchOption = 1,
    weights: WeightsOption = "copy",
    whole: Annotated[
        bool, typer.Option("--pipeline/--denoiser", help="With text encoders and VAE decoder, or without.")
    ] = True,
    random_weights: RandomWeightsOption = False,
    force: ForceOption = False,
) -> None:
    """Compile a SubNet into a bundle: static ONNX graphs, the weights files, the program."""
    from dipgo.files import refuse_existing
    from dipgo.subnet import load_subnet

    if weights == "copy":
        refuse_existing(output, force)
    found = load_subnet(subnet)
    record = _export(found, output, model, force, batch, dtype, graphs, max_graphs, weights, random_weights, whole)
    if max_graphs is not None and record.macs != found.cost.subnet:
        typer.echo(
            f"merged into {len(record.graphs)} graphs: {record.macs / found.cost.subnet - 1:+.2%} MACs, "
            f"{record.macs / found.cost.full:.2%} of the full trajectory's"
        )
    typer.echo(f"bundle: {output}")


@app.command()
def verify(
    bundle: BundleArgument,
    model: SourceOption = None,
    images: Annotated[int, typer.Option("--number", "-n", min=1, help="How many images to compare.")] = 2,
) -> None:
    """Measure the parity of a bundle with the gated diffusers pipeline; fail if it does not hold."""
    from benchmarks.parity import verify as measure

    parity = measure(bundle, model, images)
    line = f"{parity.line()}, over {parity.images} images"
    if not parity.passed:
        raise DipgoError(f"{bundle}: parity does not hold: {line}; export it again")
    typer.echo(f"parity holds: {line}")


@app.command()
def run(
    bundle: BundleArgument,
    output: OutputOption,
    label: Annotated[str | None, typer.Option("--class", help="Class to generate: its name or number.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What to generate, for a model of prompts.")] = None,
    negative: Annotated[str | None, typer.Option(help="A prompt to stay away from.")] = None,
    seed: SeedOption = 0,
    count: Annotated[int, typer.Option("--number", "-n", min=1, help="How many images.")] = 1,
    threads: ThreadsOption = None,
    force: ForceOption = False,
) -> None:
    """Generate images and save them as one PNG; several are set side by side."""
    import engines
    from dipgo.errors import UsageError
    from dipgo.files import new_file, refuse_existing
    from engines.images import grid

    output = output.with_suffix(".png")
    refuse_existing(output, force)
    with engines.load(bundle, threads) as program:
        kind = program.record.conditioning.kind
        if (label is None, prompt is None) != {"class": (False, True), "prompt": (True, False)}.get(kind, (True, True)):
            wanted = {"class": "--class alone", "prompt": "--prompt alone"}.get(kind, "neither --class nor --prompt")
            raise UsageError(f"{bundle}: conditioned by {kind}; give {wanted}")
        if negative is not None and kind != "prompt":
            raise UsageError(f"{bundle}: conditioned by {kind}; --negative is for models of prompts")
        given = [prompt or ""] * count if label is None else [program.class_of(label)] * count
        pixels = program.generate(given, seed, _bar("generate"), negative)
    with new_file(output) as draft:
        grid(pixels).save(draft)
    typer.echo(f"{count} image{'s' * (count > 1)}: {output}")


@app.command()
def bench(
    bundle: BundleArgument,
    output: OutputOption,
    model: SourceOption = None,
    images: Annotated[int, typer.Option(min=8, help="Images that quality is judged on.")] = 64,
    repeats: Annotated[int, typer.Option(min=3, help="Least repeats of each timing.")] = 10,
    threads: ThreadsOption = None,
    force: ForceOption = False,
) -> None:
    """Verify a bundle, measure it against baselines at equal MACs, and write a report."""
    _bench(bundle, output, model, images, repeats, threads, force)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(metavar="SUBNET|BUNDLE", help="A SubNet's JSON or a bundle.")],
) -> None:
    """Show gate map, signatures, slots and sizes as text."""
    from dipgo.describe import subnet_text
    from dipgo.subnet import load_subnet

    if path.is_dir():
        from export.bundle import open_bundle
        from export.describe import bundle_text

        bundle = open_bundle(path)
        typer.echo(subnet_text(load_subnet(path / bundle.record.subnet_file)))
        typer.echo(bundle_text(bundle))
    else:
        typer.echo(subnet_text(load_subnet(path)))


@app.command(name="compile")
def compile_(
    model: ModelArgument,
    steps: StepsOption,
    budget: BudgetOption,
    output: OutputOption,
    sampler: SamplerOption = None,
    sites: SitesOption = None,
    guidance: GuidanceOption = None,
    cost: CostOption = "macs",
    method: MethodOption = "dipgo",
    preset: PresetOption = "default",
    settings: SetOption = None,
    prompts: PromptsOption = None,
    classes: ClassesOption = None,
    device: DeviceOption = "cpu",
    seed: SeedOption = 0,
    threads: ThreadsOption = None,
    measure: Annotated[bool, typer.Option("--bench/--no-bench", help="Write the report too.")] = True,
    force: ForceOption = False,
) -> None:
    """All of it: OUTPUT/subnet.json, OUTPUT/bundle/ and OUTPUT/report/."""
    options = locals()
    from dipgo.files import refuse_existing

    refuse_existing(output, force)
    (subnet,) = _search(options | {"output": output / "subnet.json"})
    _export(subnet, output / "bundle", model, force)
    typer.echo(f"bundle: {output / 'bundle'}")
    if measure:
        _bench(output / "bundle", output / "report", model, 64, 10, threads, force)


def _search(options: dict[str, Any]) -> list[SubNet]:
    """Carry out a search; of a command's options those count that are in :class:`dipgo.search.request.Request`."""
    from dipgo.files import refuse_existing

    refuse_existing(options["output"], options["force"])
    with _spinner("load"):
        from dipgo.search.request import Request, carry_out
        from dipgo.search.search import describe

    def measure(task: Task, threads: int | None) -> LatencyProfile:
        from benchmarks.latency import measure_latency

        return measure_latency(task, threads=threads)

    request = Request(**{field.name: options[field.name] for field in fields(Request) if field.name in options})
    found = carry_out(request, _spinner, _phases, measure)
    for file, subnet in found:
        typer.echo(f"SubNet: {file}, keeps {subnet.cost.ratio:.2%} of the MACs; {describe(subnet.search)}")
    return [subnet for _, subnet in found]


def _export(
    subnet: SubNet,
    output: Path,
    model: str | None,
    force: bool,
    batch: int = 1,
    dtype: str = "fp32",
    graphs: str = "signature",
    max_graphs: int | None = None,
    weights: str = "copy",
    random_weights: bool = False,
    whole: bool = True,
) -> BundleRecord:
    from dipgo.models import find_model

    found = find_model(model or subnet.model.name, random_weights)
    with _spinner("export"):
        from export.compiler import Options, compile_subnet

        return compile_subnet(subnet, found, output, force, batch, dtype, Options(graphs, max_graphs, weights), whole)


def _bench(
    bundle: Path, output: Path, model: str | None, images: int, repeats: int, threads: int | None, force: bool
) -> None:
    from benchmarks.bench import bench as measure
    from benchmarks.bench import table

    report = measure(bundle, output, model, images=images, repeats=repeats, threads=threads, force=force)
    typer.echo(table(report))
    typer.echo(f"report: {output / 'report.html'}")


def _bar(label: str) -> Any:
    from tqdm import tqdm

    def progress(items: Iterable[Any]) -> Iterator[Any]:
        return iter(tqdm(items, desc=label, leave=False))

    return progress


@contextmanager
def _spinner(label: str) -> Iterator[None]:
    """Show that work goes on where its length is not known beforehand."""
    from rich.console import Console

    with Console(stderr=True).status(f"{label} …"):
        yield


@contextmanager
def _phases() -> Iterator[Report]:
    """Yield a report function that shows one progress bar a phase."""
    from tqdm import tqdm

    bars: dict[str, tqdm[Any]] = {}

    def report(phase: str, iteration: int, total: int, figure: str) -> None:
        if not _is_main():
            return
        bar = bars.get(phase) or bars.setdefault(phase, tqdm(total=total, desc=phase))
        bar.set_postfix_str(figure, refresh=False)
        bar.update(iteration - bar.n)
        if iteration == total:
            bar.close()

    try:
        yield report
    finally:
        for bar in bars.values():
            bar.close()


def _is_main() -> bool:
    """Whether this is the first of the processes that ``accelerate launch`` started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def main() -> None:
    """Run the command line: errors are one line on stderr; exit codes are 0, 1 (failed) and 2 (bad usage)."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        code = app(standalone_mode=False)
    except DipgoError as error:
        code = _fail(str(error), error.exit_code)
    except TyperException as error:
        code = _fail(f"{error.format_message().rstrip('.')}; see 'dipgo --help'", 2)
    except KeyboardInterrupt:
        code = INTERRUPTED
    if code == INTERRUPTED:
        code = _fail("interrupted; what was not finished was not written", 1)
    sys.exit(int(code or 0))


def _fail(message: str, code: int) -> int:
    if _is_main():  # all processes stop for one reason
        print(f"dipgo: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
