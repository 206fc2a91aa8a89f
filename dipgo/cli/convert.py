"""A schedule for other tools."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from dipgo.base.errors import UsageError
from dipgo.base.progress import spinner
from dipgo.cli.options import ForceOption, OutputOption, SourceOption


class Tool(StrEnum):
    cache_dit = "cache-dit"
    sglang_dpcache = "sglang-dpcache"
    deepcache = "deepcache"


def convert(
    subnet: Annotated[Path, typer.Argument(metavar="SUBNET", help="JSON file written by 'dipgo search'.")],
    to: Annotated[Tool, typer.Option("--to", help="The tool that takes it.")],
    output: OutputOption,
    like: Annotated[
        Path | None,
        typer.Option("--like", metavar="FILE", help="For sglang-dpcache: a schedule that your server planned."),
    ] = None,
    model: SourceOption = None,
    force: ForceOption = False,
) -> None:
    """Write a schedule as another tool takes it.

    It says when a step is computed. What the tool serves at the others is its own; learned backups stay in the SubNet.
    """
    from dipgo.base.files import new_file, refuse_existing
    from dipgo.base.records import read_object
    from dipgo.importers import writers
    from dipgo.schedule.subnet import load_subnet

    refuse_existing(output, force)
    if (to is Tool.sglang_dpcache) != (like is not None):
        raise UsageError("--like, a schedule that your server planned, goes with --to sglang-dpcache, which needs it")
    found = load_subnet(subnet)
    with spinner("convert"):
        if like is not None:
            document = writers.sglang_dpcache(found, read_object(like, "DPCache schedule"))
        else:
            document = writers.cache_dit(found) if to is Tool.cache_dit else writers.deepcache(found, model)
    with new_file(output, force) as draft:
        draft.write_text(json.dumps(document, indent=1) + "\n")
    left = "; the learned backups stay behind, so search results do not carry over" if found.schedule.backups else ""
    typer.echo(f"{to.value}: {output}{left}")
