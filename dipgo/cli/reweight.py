"""A bundle for other weights."""

from __future__ import annotations

from typing import Annotated

import typer

from dipgo.cli.options import BundleArgument, ForceOption, OutputOption


def reweight(
    bundle: BundleArgument,
    output: OutputOption,
    model: Annotated[
        str, typer.Option("--model", help="Other weights of the same architecture: diffusers folder, or hub id.")
    ],
    force: ForceOption = False,
) -> None:
    """Make the same bundle for a fine-tune or a fused LoRA.

    Nothing is searched: the programs stay, and what follows from the weights is made again.
    """
    from dipgo.base.files import refuse_existing
    from dipgo.model.models import find_model
    from export.bundle import BUNDLE, open_bundle
    from export.reweight import reweight as write

    refuse_existing(output, force, BUNDLE)
    opened = open_bundle(bundle)
    write(opened, find_model(model, opened.record.random_weights, opened.record.pixels), output, force)
    typer.echo(f"bundle: {output}")
