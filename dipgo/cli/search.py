"""What models there are, and SubNets for them: found by a search, or read from what others publish."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import Field

from dipgo.base.guidance import guidance_of
from dipgo.base.pixels import pixels_of
from dipgo.base.progress import Progress, spinner
from dipgo.cli.options import ForceOption, ModelArgument, OutputOption, RandomWeightsOption
from dipgo.searching.config import SearchConfig, TaskConfig

if TYPE_CHECKING:
    from dipgo.schedule.subnet import SubNet


class ImportConfig(TaskConfig):
    """What a published schedule is for, where the file does not say it or is to be used for something else."""

    model: str | None = Field(None, description="Name, folder or hub id; what the file was published for.")
    steps: int | None = Field(None, ge=2, description="Inference steps; the file's own by default.")


def models() -> None:
    """List the models that are built in or supported."""
    from dipgo.graph.facts import read_facts

    typer.echo("\n".join(read_facts().lines()))


def search(
    model: ModelArgument,
    config: SearchConfig,
    output: OutputOption,
    random_weights: RandomWeightsOption = False,
    force: ForceOption = False,
) -> None:
    """Search a SubNet of a model for a budget.

    It is written to a JSON file. Several budgets give a SubNet each, in a folder with a Pareto plot.
    """
    with spinner("load"):
        from dipgo.api import search_into
        from dipgo.model.models import find_model

    source = find_model(model, random_weights, pixels_of(config.size)) if random_weights else model
    for file, subnet in search_into(output, source, config, force, Progress()):
        typer.echo(subnet_line(file, subnet))


def subnet_line(file: Path, subnet: SubNet) -> str:
    return f"SubNet: {file}, keeps {subnet.cost.ratio:.2%} of the MACs; {subnet.search.describe()}"


def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What others publish; see docs/reference/formats.md.")],
    config: ImportConfig,
    output: OutputOption,
    force: ForceOption = False,
) -> None:
    """Read a schedule that others publish into a SubNet.

    DiP-GO's gates, DeepCache's settings, a step mask, MeanCache's or BudCache's list of steps, a SmoothCache schedule
    or InvarDiff's cache book; docs/reference/formats.md says how each is written.
    """
    from dipgo.base.files import refuse_existing
    from dipgo.importers.importer import import_subnet, summary
    from dipgo.schedule.subnet import save_subnet

    refuse_existing(output, force)
    with spinner("read and trace"):
        guidance = guidance_of(config.guidance, config.guidance_rescale)
        subnet = import_subnet(
            file, config.model, config.steps, config.sampler, config.sites, guidance, pixels_of(config.size)
        )
    save_subnet(subnet, output, force)
    typer.echo(f"SubNet: {output}, {summary(subnet)}")
