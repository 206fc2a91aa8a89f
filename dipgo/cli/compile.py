"""The main job in one command."""

from __future__ import annotations

from typing import Annotated

import typer

from dipgo.cli.export import export_with
from dipgo.cli.options import (
    BudgetOption,
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
    SamplerOption,
    SeedOption,
    SetOption,
    SitesOption,
    StartOption,
    StepsOption,
    ThreadsOption,
)
from dipgo.cli.prove import bench_with
from dipgo.cli.search import search_with


def compile_(
    model: ModelArgument,
    steps: StepsOption,
    budget: BudgetOption,
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
    threads: ThreadsOption = None,
    measure: Annotated[bool, typer.Option("--bench/--no-bench", help="Write the report too.")] = True,
    force: ForceOption = False,
) -> None:
    """All of it: OUTPUT/subnet.json, OUTPUT/bundle/ and OUTPUT/report/."""
    options = locals()
    from benchmarks.bench.report import RECORD_FILE as REPORT_FILE
    from dipgo.base.files import refuse_existing, refuse_to_fill
    from export.bundle import RECORD_FILE as BUNDLE_FILE

    refuse_to_fill(output, force)
    refuse_existing(output / "bundle", force, BUNDLE_FILE)
    if measure:
        refuse_existing(output / "report", force, REPORT_FILE)
    (subnet,) = search_with(options | {"output": output / "subnet.json"})
    export_with(subnet, output / "bundle", model, force)
    typer.echo(f"bundle: {output / 'bundle'}")
    if measure:
        bench_with(output / "bundle", output / "report", model, 64, 10, threads, force)
