"""A bundle on the hub."""

from __future__ import annotations

from typing import Annotated

import typer

from dipgo.base.errors import UsageError
from dipgo.cli.options import BundleArgument


def push(
    bundle: BundleArgument,
    name: Annotated[str, typer.Argument(metavar="USER/NAME", help="Repository on the Hugging Face hub.")],
    private: Annotated[bool, typer.Option("--private", help="Make a repository that only you see.")] = False,
) -> None:
    """Upload a bundle to the hub, with a model card.

    dipgo.load("USER/NAME") opens it anywhere.
    """
    if name.count("/") != 1 or not all(name.split("/")):
        raise UsageError(f"'{name}' is no id of a repository; give USER/NAME")
    from engines.hub import push as upload
    from export.bundle import open_bundle
    from export.card import card_of

    opened = open_bundle(bundle)
    typer.echo(f"pushed: {upload(opened, name, card_of(opened.record, name), private)}")
