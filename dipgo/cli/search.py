"""What models there are, and SubNets for them: found by a search, or read from what others publish."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dipgo.cli.options import (
    BudgetsOption,
    ClassesOption,
    CostOption,
    DeviceOption,
    ForceOption,
    GuidanceOption,
    MethodOption,
    ModelArgument,
    OutputOption,
    PresetOption,
    PromptsOption,
    RandomWeightsOption,
    ResumeOption,
    RunFolderOption,
    SamplerOption,
    SeedOption,
    SetOption,
    SitesOption,
    StartOption,
    StepsOption,
    TensorBoardOption,
    ThreadsOption,
)
from dipgo.cli.progress import phases, spinner

if TYPE_CHECKING:
    from dipgo.graph.latency import LatencyProfile
    from dipgo.schedule.subnet import SubNet
    from dipgo.searching.task import Task


def models() -> None:
    """List what is built in and supported, with sites and MACs."""
    from dipgo.model.models import architectures, built_in, find_model
    from dipgo.schedule.describe import families_text, model_text

    for title, names in (("built in:", built_in()), ("architectures, without weights:", architectures())):
        typer.echo(title)
        for name in names:
            typer.echo(f"  {model_text(find_model(name))}")
        typer.echo()
    typer.echo(families_text())


def search(
    model: ModelArgument,
    steps: StepsOption,
    budget: BudgetsOption,
    output: OutputOption,
    sampler: SamplerOption = None,
    sites: SitesOption = None,
    guidance: GuidanceOption = None,
    cost: CostOption = "macs",
    method: MethodOption = "dipgo",
    preset: PresetOption = "default",
    settings: SetOption = None,
    prompts: PromptsOption = None,
    classes: ClassesOption = None,
    start: StartOption = None,
    device: DeviceOption = "cpu",
    seed: SeedOption = 0,
    run_folder: RunFolderOption = None,
    resume: ResumeOption = False,
    tensorboard: TensorBoardOption = False,
    threads: ThreadsOption = None,
    random_weights: RandomWeightsOption = False,
    force: ForceOption = False,
) -> None:
    """Search a SubNet and write it to a JSON file; with several budgets one each, into a folder with a Pareto plot."""
    search_with(locals())


def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What others publish; see docs/formats.md.")],
    output: OutputOption,
    model: Annotated[str | None, typer.Option(help="Name, folder or hub id; what the file was published for.")] = None,
    steps: Annotated[int | None, typer.Option(min=2, help="Inference steps; the file's own by default.")] = None,
    sampler: SamplerOption = None,
    sites: SitesOption = None,
    guidance: GuidanceOption = None,
    force: ForceOption = False,
) -> None:
    """Read DiP-GO gates, DeepCache settings, a step mask or a SmoothCache schedule into a SubNet."""
    from dipgo.base.files import refuse_existing
    from dipgo.importers.importer import import_subnet, summary
    from dipgo.schedule.subnet import save_subnet

    refuse_existing(output, force)
    with spinner("read and trace"):
        subnet = import_subnet(file, model, steps, sampler, sites, guidance)
    save_subnet(subnet, output, force)
    typer.echo(f"SubNet: {output}, {summary(subnet)}")


def search_with(options: dict[str, Any]) -> list[SubNet]:
    """Carry out a search; of a command's options those count that are in :class:`dipgo.searching.request.Request`."""
    with spinner("load"):
        from dipgo.searching.request import Request, carry_out
        from dipgo.searching.search import describe

    def measure(task: Task, threads: int | None) -> LatencyProfile:
        from benchmarks.latency import measure_latency

        return measure_latency(task, threads=threads)

    request = Request(**{field.name: options[field.name] for field in fields(Request) if field.name in options})
    found = carry_out(request, spinner, phases, measure)
    for file, subnet in found:
        typer.echo(f"SubNet: {file}, keeps {subnet.cost.ratio:.2%} of the MACs; {describe(subnet.search)}")
    return [subnet for _, subnet in found]
