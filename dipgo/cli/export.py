"""From a SubNet to a bundle, and a look at either."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dipgo.base.errors import UsageError
from dipgo.cli.options import ForceOption, OutputOption, RandomWeightsOption, SourceOption, SubNetsArgument
from dipgo.cli.places import either_at
from export.config import ExportConfig


def export(
    subnets: SubNetsArgument,
    output: OutputOption,
    config: ExportConfig,
    model: SourceOption = None,
    random_weights: RandomWeightsOption = False,
    force: ForceOption = False,
) -> None:
    """Compile SubNets into a bundle that runs without torch.

    A bundle holds ONNX graphs, static unless sizes are ranges, the weights once, and a program for each SubNet.
    """
    from dipgo.base.files import refuse_existing
    from dipgo.schedule.subnet import load_subnet
    from export.bundle import BUNDLE

    if config.weights == "copy":  # before anything that takes time is imported
        refuse_existing(output, force, BUNDLE)
    searched = [load_subnet(subnet) for subnet in subnets]
    from dipgo import api
    from dipgo.model.models import find_model

    first = searched[0]
    source = find_model(model or first.model.name, random_weights, first.sampler.pixels)
    record = api.export(searched, output, config, model=source, force=force, progress=None)
    if config.max_graphs is not None:
        ratios = zip((record, *record.further), searched, strict=True)
        shares = "; ".join(f"{own.budget:.2%} of the MACs; the SubNet: {each.cost.ratio:.2%}" for own, each in ratios)
        typer.echo(f"graphs: {len(record.graphs)}, {shares}")
    typer.echo(f"bundle: {output}")


def inspect(
    path: Annotated[
        Path, typer.Argument(metavar="SUBNET|BUNDLE", help="A SubNet's JSON or a bundle.", callback=either_at)
    ],
    visual: Annotated[
        Path | None, typer.Option(metavar="PAGE", help="Also draw a graph of the bundle as a page, by Polygraphy.")
    ] = None,
    graph: Annotated[
        str | None, typer.Option(metavar="FILE", help="The graph to draw; by default that of the most MACs.")
    ] = None,
) -> None:
    """Show a SubNet's gate map, or a bundle's graphs and sizes."""
    from dipgo.schedule.describe import subnet_text
    from dipgo.schedule.subnet import load_subnet

    if path.is_dir():
        from export.bundle import open_bundle
        from export.describe import bundle_text

        bundle = open_bundle(path)
        typer.echo(subnet_text(load_subnet(path / bundle.record.subnet_file)))
        typer.echo(bundle_text(bundle))
        if visual:
            from benchmarks.debug.visual import draw

            typer.echo(f"page: {visual}, of {draw(path, visual, graph)}; a browser loads its scripts from the web")
    elif visual:
        raise UsageError(f"{path}: --visual draws graphs, which a SubNet has none of; give a bundle")
    else:
        typer.echo(subnet_text(load_subnet(path)))
