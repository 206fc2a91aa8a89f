"""The command line. The only place that knows search, export, engines and benchmarks; each is imported where needed."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.exceptions import TyperException

from dipgo.errors import DipgoError, UsageError

if TYPE_CHECKING:
    from dipgo.search.journal import Report
    from dipgo.subnet import SubNet

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
SamplerOption = Annotated[
    str | None,
    typer.Option(help="ddim, dpm++2m, euler, heun, pndm, unipc or a diffusers class; the model's own by default."),
]
SitesOption = Annotated[
    str | None,
    typer.Option(help="block, branch or layer, or module patterns joined by commas; the family's own by default."),
]
GuidanceOption = Annotated[float | None, typer.Option(help="Guidance scale; the pipeline's default by default.")]
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
    budget: BudgetOption,
    output: OutputOption,
    sampler: SamplerOption = None,
    sites: SitesOption = None,
    guidance: GuidanceOption = None,
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
    """Search a SubNet and write it to a JSON file."""
    if (resume or tensorboard) and run_folder is None:
        raise UsageError("--resume and --tensorboard need --run-folder")
    choice = {"prompts": prompts, "classes": classes, "device": device}
    keep = {"run_folder": run_folder, "resume": resume, "tensorboard": tensorboard}
    _search(
        model,
        steps,
        budget,
        output,
        sampler,
        sites,
        guidance,
        method,
        preset,
        seed,
        threads,
        force,
        random_weights,
        settings or (),
        choice,
        keep,
    )


@app.command()
def export(
    subnet: Annotated[Path, typer.Argument(metavar="SUBNET", help="JSON file written by 'dipgo search'.")],
    output: OutputOption,
    model: SourceOption = None,
    force: ForceOption = False,
) -> None:
    """Compile a SubNet into a bundle: static ONNX graphs, one weights file, the program."""
    from dipgo.files import refuse_existing
    from dipgo.subnet import load_subnet

    refuse_existing(output, force)
    _export(load_subnet(subnet), output, model, force)
    typer.echo(f"bundle: {output}")


@app.command()
def verify(bundle: BundleArgument, model: SourceOption = None) -> None:
    """Measure the parity of a bundle with the gated diffusers pipeline; fail if it does not hold."""
    from benchmarks.parity import verify as measure

    parity = measure(bundle, model)
    line = (
        f"relative error {parity.relative_error_latent:.1e} (latent), {parity.relative_error_image:.1e} (image) over "
        f"{parity.images} images, tolerance {parity.tolerance:.0e}"
    )
    if not parity.passed:
        raise DipgoError(f"{bundle}: parity does not hold: {line}; export it again")
    typer.echo(f"parity holds: {line}")


@app.command()
def run(
    bundle: BundleArgument,
    output: OutputOption,
    label: Annotated[str, typer.Option("--class", help="Class to generate: its name or number.")],
    seed: SeedOption = 0,
    count: Annotated[int, typer.Option("--number", "-n", min=1, help="How many images.")] = 1,
    threads: ThreadsOption = None,
    force: ForceOption = False,
) -> None:
    """Generate images and save them as one PNG; several are set side by side."""
    import engines
    from dipgo.files import new_file, refuse_existing
    from engines.images import grid

    output = output.with_suffix(".png")
    refuse_existing(output, force)
    with engines.load(bundle, threads) as program:
        chosen = program.class_of(label)
        pixels = program.generate([chosen] * count, seed, _bar("generate"))
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
    method: MethodOption = "dipgo",
    preset: PresetOption = "default",
    seed: SeedOption = 0,
    threads: ThreadsOption = None,
    measure: Annotated[bool, typer.Option("--bench/--no-bench", help="Write the report too.")] = True,
    force: ForceOption = False,
) -> None:
    """All of it: OUTPUT/subnet.json, OUTPUT/bundle/ and OUTPUT/report/."""
    from dipgo.files import refuse_existing

    refuse_existing(output, force)
    subnet_file = output / "subnet.json"
    subnet = _search(model, steps, budget, subnet_file, sampler, sites, guidance, method, preset, seed, threads, force)
    _export(subnet, output / "bundle", model, force)
    typer.echo(f"bundle: {output / 'bundle'}")
    if measure:
        _bench(output / "bundle", output / "report", model, 64, 10, threads, force)


def _search(
    model: str,
    steps: int,
    budget: float,
    output: Path,
    sampler: str | None,
    sites: str | None,
    guidance: float | None,
    method: str,
    preset: str,
    seed: int,
    threads: int | None,
    force: bool,
    random_weights: bool = False,
    overrides: Sequence[str] = (),
    choice: Mapping[str, Any] = MappingProxyType({}),
    keep: Mapping[str, Any] = MappingProxyType({}),
) -> SubNet:
    from dipgo.files import refuse_existing

    refuse_existing(output, force)
    if not 0 < budget <= 1:
        raise UsageError(f"budget {budget} is outside (0, 1]; give the share of the full trajectory's MACs to keep")
    if steps < 2:
        raise UsageError(f"steps = {steps}: with one step there is nothing to reuse; give at least 2")
    from dipgo.models import find_model

    found = find_model(model, random_weights)
    with _spinner("load and trace"):
        import torch

        from dipgo.search.search import describe
        from dipgo.search.search import search as run_search
        from dipgo.search.settings import settings_of
        from dipgo.search.task import make_task
        from dipgo.subnet import save_subnet

        settings = settings_of(method, preset, overrides)
        if threads:
            torch.set_num_threads(threads)
        task = make_task(found, steps, sampler, sites, guidance, **choice)
    with _phases() as report:
        subnet = run_search(task, budget, method, settings, seed, report, **keep)
    if not _is_main():
        return subnet
    save_subnet(subnet, output, force)
    typer.echo(f"SubNet: {output}, keeps {subnet.cost.ratio:.2%} of the MACs; {describe(subnet.search)}")
    return subnet


def _export(subnet: SubNet, output: Path, model: str | None, force: bool) -> None:
    from dipgo.models import find_model

    found = find_model(model or subnet.model.name)
    with _spinner("export"):
        from export.compiler import compile_subnet

        compile_subnet(subnet, found, output, force)


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
