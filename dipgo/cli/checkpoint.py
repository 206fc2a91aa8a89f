"""From a checkpoint in one file to a pipeline's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dipgo.cli.options import OutputOption


def import_checkpoint(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A .safetensors checkpoint of SD-1, SD-2 or SDXL.")],
    output: OutputOption,
    like: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Architecture or folder with its configurations; told by the file if not."),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="CLIP's tokenizer: a folder or hub id; fetched if not given.")
    ] = None,
) -> None:
    """Make a pipeline's folder of a checkpoint in one file.

    Every other command takes the folder as MODEL.
    """
    from dipgo.base.progress import spinner
    from dipgo.model.single_file import import_checkpoint as import_file

    with spinner("read"):
        name = import_file(file, output, like, tokenizer)
    typer.echo(f"model: {output}, like {name}")
