"""From a SubNet to a bundle, and a look at either."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dipgo.cli.options import (
    BatchOption,
    DtypeOption,
    ForceOption,
    GraphsOption,
    MaxGraphsOption,
    OutputOption,
    RandomWeightsOption,
    SizeOption,
    SourceOption,
    WeightsOption,
)
from dipgo.cli.progress import spinner

if TYPE_CHECKING:
    from dipgo.schedule.subnet import SubNet
    from export.bundle import BundleRecord


def export(
    subnet: Annotated[Path, typer.Argument(metavar="SUBNET", help="JSON file written by 'dipgo search'.")],
    output: OutputOption,
    model: SourceOption = None,
    graphs: GraphsOption = "signature",
    max_graphs: MaxGraphsOption = None,
    dtype: DtypeOption = "fp32",
    batch: BatchOption = "1",
    size: SizeOption = None,
    weights: WeightsOption = "copy",
    whole: Annotated[
        bool, typer.Option("--pipeline/--denoiser", help="With text encoders and VAE decoder, or without.")
    ] = True,
    random_weights: RandomWeightsOption = False,
    force: ForceOption = False,
) -> None:
    """Compile a SubNet into a bundle: ONNX graphs, static unless sizes are ranges, the weights files, the program."""
    from dipgo.base.files import refuse_existing
    from dipgo.schedule.subnet import load_subnet
    from export.bundle import RECORD_FILE

    if weights == "copy":
        refuse_existing(output, force, RECORD_FILE)
    found = load_subnet(subnet)
    record = export_with(
        found, output, model, force, batch, dtype, graphs, max_graphs, weights, random_weights, whole, size
    )
    if max_graphs is not None:
        ratio = load_subnet(output / record.subnet_file).cost.ratio
        typer.echo(f"graphs: {len(record.graphs)}, {ratio:.2%} of the MACs; the SubNet: {found.cost.ratio:.2%}")
    typer.echo(f"bundle: {output}")


def inspect(
    path: Annotated[Path, typer.Argument(metavar="SUBNET|BUNDLE", help="A SubNet's JSON or a bundle.")],
) -> None:
    """Show gate map, signatures, slots and sizes as text."""
    from dipgo.schedule.describe import subnet_text
    from dipgo.schedule.subnet import load_subnet

    if path.is_dir():
        from export.bundle import open_bundle
        from export.describe import bundle_text

        bundle = open_bundle(path)
        typer.echo(subnet_text(load_subnet(path / bundle.record.subnet_file)))
        typer.echo(bundle_text(bundle))
    else:
        typer.echo(subnet_text(load_subnet(path)))


def export_with(
    subnet: SubNet,
    output: Path,
    model: str | None,
    force: bool,
    batch: int | str = 1,
    dtype: str = "fp32",
    graphs: str = "signature",
    max_graphs: int | None = None,
    weights: str = "copy",
    random_weights: bool = False,
    whole: bool = True,
    size: str | None = None,
) -> BundleRecord:
    from dipgo.model.models import find_model

    found = find_model(model or subnet.model.name, random_weights)
    with spinner("export"):
        from export.compiler import Options, compile_subnet

        options = Options(graphs, max_graphs, weights)
        return compile_subnet(subnet, found, output, force, batch, dtype, options, whole, size)
