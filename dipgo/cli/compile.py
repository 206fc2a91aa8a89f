"""The main job in one command."""

from __future__ import annotations

from typing import Annotated

import typer

from dipgo.cli.options import ForceOption, ModelArgument, OutputOption, RandomWeightsOption
from dipgo.searching.config import SearchConfig
from export.config import ExportConfig


def compile_(
    model: ModelArgument,
    search: SearchConfig,
    export: ExportConfig,
    output: OutputOption,
    measure: Annotated[bool, typer.Option("--bench/--no-bench", help="Write the report too.")] = True,
    random_weights: RandomWeightsOption = False,
    force: ForceOption = False,
) -> None:
    """Search, export and measure: all of it in one command.

    Writes OUTPUT/subnet.json, OUTPUT/bundle/ and OUTPUT/report/.
    """
    from benchmarks.bench.config import BenchConfig
    from dipgo.base.config import checked
    from dipgo.base.files import refuse_to_fill
    from dipgo.cli.recipe import carry_out
    from dipgo.cli.recipe_file import Recipe

    refuse_to_fill(output, force or search.resume)
    recipe = {"about": "dipgo compile", "model": model, "random_weights": random_weights, "output": output}
    recipe |= {"search": search, "export": export}
    if measure:
        recipe["bench"] = BenchConfig(threads=search.threads)
    for line in carry_out(checked(Recipe, recipe), force):
        typer.echo(line)
