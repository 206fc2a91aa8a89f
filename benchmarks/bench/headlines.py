"""The report's first lines, computed from its rows: where the plan loses, what was measured, what to bear in mind."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.bench.environment import Environment
from benchmarks.bench.report import Headline, Kind, Row, decibels, milliseconds
from benchmarks.bench.timing import Timing
from dipgo.base.records import ModelIdentity, SamplerIdentity

EQUAL = 1.1  # a baseline with up to so many times the bundle's MACs is one at equal compute
POOR = 0.5  # an efficiency below this says that the program, not its schedule, is slow


def headlines(
    model: ModelIdentity, sampler: SamplerIdentity, rows: Sequence[Row], scope: str, place: Environment
) -> list[Headline]:
    """Return the first lines: where the bundle loses to a baseline, what was measured, what to bear in mind.

    ``rows`` begin with the full program and the bundle, both timed.
    """
    full, own, *others = rows
    assert full.timing and own.timing and own.macs_ratio is not None  # noqa: PT018 - for mypy
    assert own.efficiency is not None
    speedup = own.timing.speedup
    limit = own.macs_ratio * EQUAL
    equal = [row for row in others if row.macs_ratio is not None and row.macs_ratio <= limit]
    losses = _losses(own, equal, [row for row in others if row not in equal])
    results = [
        f"{model.name}: {sampler.steps} steps of {sampler.class_name}, guidance {sampler.guidance_scale:g}, "
        f"{own.macs_ratio:.1%} of the MACs.",
        f"{speedup.median:.2f} times the speed of the full program, compiled the same way: "
        f"{milliseconds(own.timing.wall.median)} against {milliseconds(full.timing.wall.median)}, "
        f"{_rounds(own.timing)}; {scope}; {place.cpu}; efficiency {own.efficiency:.2f}.",
    ]
    if own.quality:
        judged = [(row.quality.psnr_db, row.name) for row in equal if row.quality]
        best = ""
        if judged and max(judged)[0] <= own.quality.psnr_db:
            best = f"; the next best at equal compute, '{max(judged)[1]}', has {decibels(max(judged)[0])}"
        results.append(
            f"PSNR to the full program's images over {own.quality.images} images: "
            f"{decibels(own.quality.psnr_db)}{best}."
        )
    kinds: dict[Kind, list[str]] = {"loss": losses, "result": results, "note": _notes(model, rows, place)}
    return [Headline(kind=kind, line=line) for kind, lines in kinds.items() for line in lines]


def _rounds(timing: Timing) -> str:
    """Return how often a time was taken, and how far the rounds' ratios lie apart."""
    if len(timing.samples) == 1:
        return "one run of each"
    speedup = timing.speedup
    return (
        f"median of {len(timing.samples)} interleaved rounds (their ratios {speedup.p5:.2f} to {speedup.p95:.2f}, "
        "p5 to p95)"
    )


def _losses(own: Row, equal: Sequence[Row], others: Sequence[Row]) -> list[str]:
    """Return where the bundle loses: in PSNR or speed at equal MACs, in speed to any other, to the full program."""
    assert own.timing and own.macs_ratio is not None and own.efficiency is not None  # noqa: PT018 - for mypy
    speedup, losses = own.timing.speedup.median, []
    if own.quality:
        mine = own.quality.psnr_db
        better = [(row.quality.psnr_db, row) for row in equal if row.quality and row.quality.psnr_db > mine]
        losses += [
            f"Loses to '{row.name}' in PSNR: {decibels(mine)} against {decibels(theirs)}, with {own.macs_ratio:.1%} of "
            f"the MACs against {row.macs_ratio or 0:.1%}."
            for theirs, row in sorted(better, key=lambda entry: -entry[0])
        ]
        for row in others:
            if row.quality and row.timing and row.quality.psnr_db > mine and row.timing.speedup.median > speedup:
                losses.append(
                    f"Loses to '{row.name}' in speed and PSNR: {speedup:.2f} times the full program's and "
                    f"{decibels(mine)}, against {row.timing.speedup.median:.2f} and {decibels(row.quality.psnr_db)}."
                )
    for ahead, where in ((_faster(equal, speedup), "speed at equal MACs"), (_faster(others, speedup), "speed")):
        if ahead:
            rivals = ", ".join(f"'{row.name}' {row.timing.speedup.median:.2f}" for row in ahead if row.timing)
            losses.append(f"Loses in {where}: {speedup:.2f} times the full program's, against {rivals}.")
    if speedup < 1:
        losses.append(f"Slower than the full program: {speedup:.2f} times its speed.")
    if own.efficiency < POOR:
        losses.append(
            f"Efficiency {own.efficiency:.2f}: {own.macs_ratio:.1%} of the MACs take "
            f"{1 / speedup:.1%} of the full program's time."
        )
    return losses


def _faster(rows: Sequence[Row], speedup: float) -> list[Row]:
    return [row for row in rows if row.timing and row.timing.speedup.median > speedup]


def _notes(model: ModelIdentity, rows: Sequence[Row], place: Environment) -> list[str]:
    notes = [f"Not measured: '{row.name}' ({row.error})." for row in rows if row.error]
    if place.load_at_start[0] > place.cores / 4:
        notes.append(
            f"The machine was not idle: load average {place.load_at_start[0]:.1f} on {place.cores} cores at the start."
        )
    if model.weights_sha256 is None:
        notes.append("Random weights: images are meaningless.")
    return notes
