"""From a bundle to images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dipgo.base.errors import UsageError
from dipgo.cli.options import (
    BackendOption,
    BundleArgument,
    ForceOption,
    OutputOption,
    SeedOption,
    ThreadsOption,
)
from dipgo.cli.progress import bar


def run(
    bundle: BundleArgument,
    output: OutputOption,
    label: Annotated[str | None, typer.Option("--class", help="Class to generate: its name or number.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What to generate, for a model of prompts.")] = None,
    negative: Annotated[str | None, typer.Option(help="A prompt to stay away from.")] = None,
    seed: SeedOption = 0,
    count: Annotated[int, typer.Option("--number", "-n", min=1, help="How many images.")] = 1,
    size: Annotated[
        str | None, typer.Option(help="Pixels, N or HEIGHTxWIDTH, where the bundle takes several sizes.")
    ] = None,
    backend: BackendOption = "onnxruntime",
    threads: ThreadsOption = None,
    force: ForceOption = False,
) -> None:
    """Generate images and save them as one PNG; several are set side by side."""
    from dipgo.base.files import new_file, refuse_existing
    from engines.pipeline.images import grid
    from engines.pipeline.pipeline import load

    output = _picture(output)
    refuse_existing(output, force)
    wanted_size = _pixels(size) if size else None
    with load(bundle, threads, backend) as program:
        kind = program.record.conditioning.kind
        if (label is None, prompt is None) != {"class": (False, True), "prompt": (True, False)}.get(kind, (True, True)):
            wanted = {"class": "--class alone", "prompt": "--prompt alone"}.get(kind, "neither --class nor --prompt")
            raise UsageError(f"{bundle}: conditioned by {kind}; give {wanted}")
        if negative is not None and kind != "prompt":
            raise UsageError(f"{bundle}: conditioned by {kind}; --negative is for models of prompts")
        given = [prompt or ""] * count if label is None else [program.class_of(label)] * count
        pixels = program.generate(given, seed, bar("generate"), negative, wanted_size)
    with new_file(output, force) as draft:
        grid(pixels).save(draft)
    typer.echo(f"{count} image{'s' * (count > 1)}: {output}")


def _picture(path: Path) -> Path:
    if path.name in ("", ".."):
        raise UsageError(f"-o {path}: names no file; give one, such as out.png")
    return path if path.suffix.lower() == ".png" else path.with_name(f"{path.name}.png")


def _pixels(size: str) -> tuple[int, int]:
    sides = size.lower().split("x")
    if not all(side.isascii() and side.isdecimal() and 0 < len(side) < 6 for side in sides) or len(sides) > 2:
        raise UsageError(f"--size {size}: give pixels, N or HEIGHTxWIDTH, such as 512 or 512x768")
    return int(sides[0]), int(sides[-1])
