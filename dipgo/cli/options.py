"""What commands take: arguments and options, each with one name and one help text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Built-in name, diffusers folder, or hub id.")]
BundleArgument = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder written by 'dipgo export'.")]
OutputOption = Annotated[Path, typer.Option("--output", "-o", help="Where to write.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace an output that exists.")]
BackendOption = Annotated[str, typer.Option(help="What runs the graphs; 'dipgo doctor' lists them.")]
ThreadsOption = Annotated[int | None, typer.Option(min=1, max=1024, help="Threads; all cores by default.")]
StepsOption = Annotated[int, typer.Option(help="Inference steps of the full trajectory.")]
BudgetOption = Annotated[float, typer.Option(help="Share of the full trajectory's MACs to keep, in (0, 1].")]
BudgetsOption = Annotated[
    str,
    typer.Option(
        help="Share of the full trajectory's MACs to keep, in (0, 1]; several joined by commas, such as 0.5,0.35,0.25, "
        "each start from the last."
    ),
]
SamplerOption = Annotated[
    str | None,
    typer.Option(help="ddim, dpm++2m, euler, heun, pndm, unipc or a diffusers class; the model's own by default."),
]
SitesOption = Annotated[
    str | None,
    typer.Option(help="block, branch or layer, or module patterns joined by commas; the family's own by default."),
]
GuidanceOption = Annotated[float | None, typer.Option(help="Guidance scale; the pipeline's default by default.")]
CostOption = Annotated[
    str,
    typer.Option(
        help="What the budget is a share of: macs, latency (measured here), or the file of a SubNet that was searched "
        "by latency, for the one measured there."
    ),
]
MethodOption = Annotated[str, typer.Option(help="dipgo, or paper for the published procedure.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Change a setting of the search; may be given again."),
]
PromptsOption = Annotated[
    Path | None, typer.Option(help="Prompts to search on, one a line, UTF-8, where prompts condition the model.")
]
ClassesOption = Annotated[
    str | None, typer.Option(help="Classes to search on, joined by commas, or all, where classes condition the model.")
]
StartOption = Annotated[
    list[Path] | None,
    typer.Option(help="SubNet to begin with, besides the fixed schedules: an imported or a found one; repeatable."),
]
DeviceOption = Annotated[str, typer.Option(help="Where to search: cpu, or cuda where torch has it.")]
RunFolderOption = Annotated[
    Path | None, typer.Option(help="Keep checkpoints and figures of the search in this folder; see --resume.")
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on with the search in --run-folder.")]
TensorBoardOption = Annotated[bool, typer.Option("--tensorboard", help="Log for TensorBoard too, in --run-folder.")]
PresetOption = Annotated[str, typer.Option(help="default, or quick for a first look.")]
SeedOption = Annotated[int, typer.Option(min=0, help="Seed of everything that is drawn.")]
RandomWeightsOption = Annotated[
    bool, typer.Option("--random-weights", help="Draw the weights: for structure and speed, images are meaningless.")
]
BatchOption = Annotated[str, typer.Option(help="Images a call: a number, or a range: min:max, min:opt:max.")]
SizeOption = Annotated[
    str | None,
    typer.Option(help="Of images in pixels: SIZE or HEIGHTxWIDTH, each a number or a range; the model's by default."),
]
DtypeOption = Annotated[str, typer.Option(help="fp32, fp16 or bf16.")]
GraphsOption = Annotated[
    str, typer.Option(help="signature: one graph a set of computed sites; segment: every block in one graph; step.")
]
MaxGraphsOption = Annotated[
    int | None, typer.Option(min=1, help="Merge signatures down to as many, at the least added MACs.")
]
WeightsOption = Annotated[
    str, typer.Option(help="copy: a bundle of its own; in-place: graphs in the pipeline's folder, nothing copied.")
]
SourceOption = Annotated[
    str | None, typer.Option("--model", help="Where the model lies now, if not where it was searched.")
]
