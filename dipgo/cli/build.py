"""From a bundle to the engines of a backend."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from dipgo.base.errors import UsageError
from dipgo.base.progress import Progress, bar
from dipgo.base.units import size
from dipgo.cli.options import BundleArgument

if TYPE_CHECKING:
    from engines.trt.build import Build

BUILT = ("tensorrt", "torch-aot")
"""The backends that have something to build beforehand."""


def build(
    bundle: BundleArgument,
    backend: Annotated[str, typer.Option(help=f"{' or '.join(BUILT)}; other backends build nothing.")] = "tensorrt",
    workers: Annotated[int, typer.Option(min=1, help="TensorRT engines to build at a time.")] = 1,
    strip: Annotated[
        bool, typer.Option("--strip", help="TensorRT engines without weights, which the bundle gives at each start.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Build all engines again.")] = False,
) -> None:
    """Build a bundle's engines for TensorRT or torch-aot.

    Those that are there already stay; a build that was stopped goes on where it was.
    """
    from export.bundle import open_bundle

    if backend not in BUILT:
        raise UsageError(f"backend '{backend}' builds nothing; use {' or '.join(BUILT)}")
    if backend == "torch-aot":
        from engines.torchrt.aot import build as compile_packages
        from engines.torchrt.runner import default_device

        device = default_device()
        for path in compile_packages(open_bundle(bundle), device, force=force, progress=bar("build")):
            typer.echo(f"{path.name}: {size(path.stat().st_size)}, for {device}")
        return
    from engines.trt.build import build as build_engines
    from engines.trt.loader import BuildOptions

    opened = open_bundle(bundle, check_files=False)  # checked before anything is built
    with Progress().phases() as report:
        built = build_engines(opened, workers, force, BuildOptions(strip=strip), report)
    for line in lines_of(built):
        typer.echo(line)


def lines_of(built: Build) -> list[str]:
    """Return what a build came to: a line per engine, a sum, and whether this machine can run them."""
    lines = [
        f"{engine.path.name}: {size(engine.record.bytes)}, "
        + (f"built in {engine.record.seconds:.1f} s" if engine.is_new else "there already")
        for engine in built.engines
    ]
    new = sum(engine.is_new for engine in built.engines)
    total = size(sum(engine.record.bytes for engine in built.engines))
    lines.append(f"{len(built.engines)} engines, {new} of them new, {total}: {built.library} for {built.target}")
    if built.device is None:
        lines.append("built, not run: no GPU can be used here")
    return lines
