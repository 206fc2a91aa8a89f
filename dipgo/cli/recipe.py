"""Recipes, listed, copied, checked and carried out."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from dipgo.base.config import unknown
from dipgo.base.errors import UsageError
from dipgo.cli.bench import report_lines
from dipgo.cli.groups import Commands, add, group, show_help
from dipgo.cli.options import ForceOption
from dipgo.cli.recipe_file import FOLDER, Recipe, read_recipe, shipped
from dipgo.cli.search import subnet_line

RecipeArgument = Annotated[Path, typer.Argument(metavar="FILE", help="A recipe's YAML file, or one that ships.")]


def ls() -> None:
    """List the recipes that ship."""
    width = max(map(len, shipped()))
    for name in shipped():
        typer.echo(f"{name:{width}}  {read_recipe(Path(name)).about}")


def cp(
    name: Annotated[str, typer.Argument(metavar="NAME", help="One of 'dipgo recipe ls'.")],
    file: Annotated[Path | None, typer.Argument(metavar="FILE", help="NAME.yaml by default.")] = None,
    force: ForceOption = False,
) -> None:
    """Copy a recipe that ships, to change it."""
    from dipgo.base.files import new_file

    if name not in shipped():
        raise UsageError(unknown("recipe", name, shipped()))
    target = file or Path(f"{name}.yaml")
    with new_file(target, force) as draft:
        shutil.copyfile(FOLDER / f"{name}.yaml", draft)
    typer.echo(f"recipe: {target}")


def validate(file: RecipeArgument) -> None:
    """Say whether a recipe makes sense; nothing is done."""
    recipe = read_recipe(file)
    typer.echo(f"{file}: {', '.join(recipe.sections())} of {recipe.model} into {recipe.output}")


def run(
    file: RecipeArgument,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as search.budget=0.2.")
    ] = None,
    force: ForceOption = False,
) -> None:
    """Do what a recipe says."""
    recipe = read_recipe(file, overrides or ())
    for line in carry_out(recipe, force):
        typer.echo(line)


def recipes() -> typer.Typer:
    """Return the group of these commands."""
    app = group("Search, compile, prove and run as one YAML file says.")
    app.callback()(show_help)
    examples: Commands = {
        ls: "dipgo recipe ls",
        cp: "dipgo recipe cp digits-dit mine.yaml",
        validate: "dipgo recipe validate mine.yaml",
        run: "dipgo recipe run digits-dit search.budget=0.3",
    }
    add(app, examples)
    return app


def carry_out(recipe: Recipe, force: bool = False) -> Iterator[str]:
    """Do what a recipe says; yields a line for each thing that is done.

    Raises:
        UsageError, DipgoError: before anything is done where an output exists, else as each step raises it.
    """
    from dipgo import api
    from dipgo.base.pixels import pixels_of
    from dipgo.base.progress import Progress, is_main
    from dipgo.model.models import find_model

    output, bundle = recipe.output, recipe.output / "bundle"
    _check_outputs(recipe, force)
    model = find_model(recipe.model, recipe.random_weights, pixels_of(recipe.search.size) if recipe.search else None)
    subnet: Any = recipe.subnet

    def rest(image: float) -> float:
        from benchmarks.bench.plan import EXPORT, foreseen

        assert recipe.search
        measured = foreseen(recipe.bench.settings(), image, recipe.search.budget[-1]) if recipe.bench else 0.0
        return measured + (EXPORT if recipe.export else 0.0)

    if recipe.search:
        path = output / ("subnets" if recipe.search.several else "subnet.json")
        for file, subnet in api.search_into(path, model, recipe.search, force, Progress(), rest):
            yield subnet_line(file, subnet)
        if not is_main():  # of several processes one writes
            return
    if recipe.export:
        api.export(subnet, bundle, recipe.export, model=model, force=force, progress=None)
        yield f"bundle: {bundle}"
    if recipe.verify:
        yield recipe.verify.line(bundle, str(model.folder))
    if recipe.bench:
        report = api.bench(bundle, output / "report", recipe.bench, model=str(model.folder), force=force, progress=None)
        yield from report_lines(report, output / "report")
    if recipe.evaluate:
        from benchmarks.studies.evaluate import evaluate

        evaluation = evaluate(bundle, recipe.evaluate.prompts, output / "evaluation", recipe.evaluate)
        if evaluation:
            scores = [f"{name} {getattr(evaluation, name)}" for name in ("clip_score", "fid")]
            yield f"evaluation: {output / 'evaluation'}, {evaluation.images} images, {', '.join(scores)}"
    if recipe.run:
        yield recipe.run.save(bundle, output / "images.png", force)


def _check_outputs(recipe: Recipe, force: bool) -> None:
    from benchmarks.bench.report import REPORT
    from dipgo.base.files import refuse_existing
    from dipgo.searching.outputs import Outputs
    from export.bundle import BUNDLE

    output = recipe.output
    if recipe.search:
        Outputs(output / ("subnets" if recipe.search.several else "subnet.json"), recipe.search, force).check()
    if recipe.export and recipe.export.weights == "copy":
        refuse_existing(output / "bundle", force, BUNDLE)
    if recipe.bench:
        refuse_existing(output / "report", force, REPORT)
    if recipe.run:
        refuse_existing(output / "images.png", force)
