"""What dipgo does, in a minute."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dipgo.base.own_packages import ROOT
from dipgo.cli.options import ForceOption

if TYPE_CHECKING:
    from benchmarks.bench.demo import Demonstration

SUBNETS = [  # the first is shown
    ROOT / "benchmarks" / "subnets" / "emoji-sd" / file
    for file in (
        "ddim-50/layer.json",
        "ddim-50/0.35.json",
        "ddim-30/0.2.json",
        "ddim-30/0.35.json",
        "ddim/0.2.json",
        "ddim/0.35.json",
    )
]
PICTURE = "picture.png"


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write into.")] = Path("dipgo-demo"),
    force: ForceOption = False,
) -> None:
    """See it in a minute, on a model that ships.

    SubNets of emoji-sd of 50, 30 and 20 steps are compiled into OUTPUT/bundle. The first is verified, and set beside
    the full model and beside as many plain steps as take as long: OUTPUT/picture.png. Nothing is downloaded.
    """
    from dipgo.base.files import refuse_existing
    from dipgo.base.progress import Progress
    from export.bundle import BUNDLE

    bundle, picture = output / "bundle", output / PICTURE
    refuse_existing(bundle, force, BUNDLE)
    refuse_existing(picture, force)
    with Progress().phases() as report:
        report("load torch and diffusers", 0, 1, "")
        from benchmarks.bench.demo import demonstrate

        shown = demonstrate(SUBNETS, bundle, picture, force, report=report)
    for line in lines_of(shown, output):
        typer.echo(line)


def lines_of(shown: Demonstration, output: Path) -> Iterator[str]:
    """Yield the table, whether the program is right, and what to do next."""
    from benchmarks.bench.page import aligned
    from benchmarks.bench.report import decibels, milliseconds
    from benchmarks.bench.strips import program_of

    head = ("program", "time per image", "speedup", "PSNR to full", "MACs")
    cells = [
        (
            program_of(row),
            milliseconds(row.timing.wall.median),
            f"{row.timing.speedup.median:.2f}",
            "reference" if row is shown.rows[0] else decibels(row.quality.psnr_db),
            f"{row.macs_ratio:.1%}",
        )
        for row in shown.rows
        if row.timing and row.quality
    ]
    yield from aligned([head, *cells])
    yield f"the program does what torch does under the same schedule: {shown.parity.line()}"
    yield f"picture: {output / PICTURE}"
    yield "next:"
    place = shlex.quote(str(output))
    commands = {
        f'dipgo run {place} --prompt "black cat" -n 4': "other images, without torch",
        f'dipgo run {place} --prompt "black cat" --steps 20 --budget 0.35': "by another program of the bundle",
        f"dipgo bench {place} -o {place}/report": "a report, in minutes",
        "dipgo search digits-dit --steps 20 --budget 0.35 --preset quick -o digits.json": "a search",
        "dipgo doctor": "what this machine can run",
    }
    width = max(map(len, commands))
    yield from (f"  {command:{width}}  # {why}" for command, why in commands.items())
