"""Schedules side by side, without an export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.bench.config import JudgeConfig
from dipgo.cli.options import ForceOption, SourceOption, SubNetsArgument


def judge(
    files: SubNetsArgument,
    config: JudgeConfig,
    model: SourceOption = None,
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all figures too.")] = None,
    force: ForceOption = False,
) -> None:
    """Compare schedules in torch, without an export.

    How close each comes to the full trajectory, and which differ beyond chance.
    """
    from dipgo.base.files import new_file, refuse_existing

    if json is not None:
        refuse_existing(json, force)
    from benchmarks.bench.judgement import table
    from dipgo import api

    judgement = api.judge(files, config, model=model, progress=None)
    if json is not None:
        with new_file(json, force) as draft:
            draft.write_text(judgement.text())
    typer.echo(table(judgement))
