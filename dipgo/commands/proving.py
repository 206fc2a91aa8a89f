"""Whether a bundle is right, and how fast it is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dipgo.commands.options import (
    BundleArgument,
    ForceOption,
    OutputOption,
    SourceOption,
    ThreadsOption,
)
from dipgo.errors import DipgoError


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
    bench_with(bundle, output, model, images, repeats, threads, force)


def bench_with(
    bundle: Path, output: Path, model: str | None, images: int, repeats: int, threads: int | None, force: bool
) -> None:
    from benchmarks.bench import bench as measure
    from benchmarks.bench import table

    report = measure(bundle, output, model, images=images, repeats=repeats, threads=threads, force=force)
    typer.echo(table(report))
    typer.echo(f"report: {output / 'report.html'}")
