"""Whether a bundle is right, and how fast it is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dipgo.base.errors import DipgoError, UsageError
from dipgo.cli.options import (
    BackendOption,
    BundleArgument,
    ForceOption,
    SourceOption,
    ThreadsOption,
)


def verify(
    bundle: BundleArgument,
    model: SourceOption = None,
    images: Annotated[int, typer.Option("--number", "-n", min=1, help="How many images to compare.")] = 2,
    backend: BackendOption = "onnxruntime",
) -> None:
    """Measure the parity of a bundle with the gated diffusers pipeline; fail if it does not hold."""
    from benchmarks.bench.parity import verify as measure

    parity = measure(bundle, model, images, backend=backend)
    line = f"{parity.line()}, over {parity.images} images"
    if not parity.passed:
        raise DipgoError(f"{bundle}: parity does not hold: {line}; export it again")
    typer.echo(f"parity holds: {line}")


def bench(
    bundle: Annotated[
        Path | None, typer.Argument(metavar="BUNDLE", help="Folder written by 'dipgo export'.", show_default=False)
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where to write.")] = None,
    suite: Annotated[
        str | None, typer.Option(help="What to measure: quick (default), quality, sd15, …, or a suite's .yaml file.")
    ] = None,
    model: SourceOption = None,
    images: Annotated[
        int | None, typer.Option(min=8, help="Images that quality is judged on; the suite's by default.")
    ] = None,
    repeats: Annotated[
        int | None, typer.Option(min=3, help="Least repeats of each timing; the suite's by default.")
    ] = None,
    threads: ThreadsOption = None,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(metavar="A B", help="Set two reports side by side; measures nothing.")
    ] = None,
    force: ForceOption = False,
) -> None:
    """Verify a bundle, measure it against baselines, and write a report; or compare two reports."""
    if compare is not None:
        if bundle or suite:
            raise UsageError("--compare takes two reports and measures nothing; leave BUNDLE and --suite out")
        compare_with(*compare, output, force)
        return
    if bundle is None or output is None:
        raise UsageError("give a BUNDLE and -o REPORT, or --compare A B; see 'dipgo bench --help'")
    bench_with(bundle, output, model, images, repeats, threads, force, suite)


def bench_with(
    bundle: Path,
    output: Path,
    model: str | None,
    images: int | None,
    repeats: int | None,
    threads: int | None,
    force: bool,
    suite: str | None = None,
) -> None:
    from benchmarks.bench.bench import bench as measure
    from benchmarks.bench.suite import DEFAULT
    from benchmarks.pages.gpu import table

    report = measure(
        bundle, output, model, suite or DEFAULT, images=images, repeats=repeats, threads=threads, force=force
    )
    typer.echo(table(report))
    typer.echo(f"report: {output / 'report.html'}")


def compare_with(first: Path, second: Path, output: Path | None, force: bool) -> None:
    from benchmarks.bench.compare import NAMES, compare, text, write_comparison
    from dipgo.base.files import refuse_existing

    if output is not None:
        refuse_existing(output, force, NAMES[0])
    found = compare(first, second)
    typer.echo(text(found))
    if output is not None:
        write_comparison(found, output, force)
        typer.echo(f"comparison: {output / 'comparison.html'}")
