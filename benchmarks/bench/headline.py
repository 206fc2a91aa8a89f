"""The first lines of a report: the trade in one sentence, where the bundle loses, what to bear in mind.

A loss is told only where the bootstrap interval of what was measured in pairs says so: images from the same noise,
times of the same round.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.bench.baselines import EQUAL_TIME
from benchmarks.bench.chance import mean_interval, median_interval
from benchmarks.bench.report import Headline, Row, Tone, decibels, milliseconds
from benchmarks.bench.timing import Timing
from benchmarks.environment import Environment
from dipgo.base.records import ModelIdentity, SamplerIdentity
from dipgo.base.units import duration

EQUAL = 1.1  # a baseline whose MACs differ from the bundle's by up to this factor is one at equal compute
POOR = 0.5  # an efficiency below this says that the program, not its schedule, is slow
PLAIN = {"fewer steps": "equal MACs", EQUAL_TIME: "equal time"}


def headlines(
    model: ModelIdentity,
    sampler: SamplerIdentity,
    rows: Sequence[Row],
    scope: str,
    place: Environment,
    search_seconds: float | None = None,
) -> list[Headline]:
    """Return the first lines; ``rows`` begin with the full program and the bundle, both timed."""
    full, own, *others = rows
    assert full.timing and own.timing and own.macs_ratio is not None  # noqa: PT018 - for mypy
    assert own.efficiency is not None
    results = [
        _trade(own, others),
        f"{model.name}, {sampler.steps} steps of {sampler.class_name}, guidance {sampler.guidance_scale:g}, "
        f"{own.macs_ratio:.1%} of the MACs; {milliseconds(own.timing.wall.median)} against "
        f"{milliseconds(full.timing.wall.median)} of the full program, compiled the same way, {_rounds(own.timing)}; "
        f"{scope}; {place.cpu}; efficiency {own.efficiency:.2f}.",
        *_paid(full.timing, own.timing, search_seconds),
    ]
    kinds: dict[Tone, list[str]] = {
        "result": results,
        "loss": _losses(own, others),
        "note": _notes(model, rows, place),
    }
    return [Headline(kind=kind, line=line) for kind, lines in kinds.items() for line in lines]


def _trade(own: Row, others: Sequence[Row]) -> str:
    """Return speed and quality of the bundle and of plain steps, in one sentence."""
    line = f"{_figures(own)} from the full images" if own.quality else f"{_figures(own)} as the full program"
    line = line.replace(" times", " times as fast", 1)
    for row in others:
        if row.name in PLAIN and row.timing:
            line += f"; {row.steps} plain steps ({PLAIN[row.name]}): {_figures(row)}"
    return f"{line}."


def _figures(row: Row) -> str:
    assert row.timing
    times = f"{row.timing.speedup.median:.2f} times"
    return f"{times}, {decibels(row.quality.psnr_db)}" if row.quality else times


def _paid(full: Timing, own: Timing, search_seconds: float | None) -> list[str]:
    """Return what the search cost, and after how many calls of the bundle that is won back."""
    saved = full.wall.median - own.wall.median
    if not search_seconds or saved <= 0:
        return []
    runs = int(np.ceil(search_seconds / saved))
    saving = f"{milliseconds(saved)} saved per run"
    return [f"The search took {duration(search_seconds)}; with {saving} it has paid after {runs:,} runs."]


def _rounds(timing: Timing) -> str:
    """Return how often a time was taken, and how far the rounds' ratios lie apart."""
    if len(timing.samples) == 1:
        return "one run of each"
    speedup = timing.speedup
    return (
        f"median of {len(timing.samples)} interleaved rounds (their ratios {speedup.p5:.2f} to {speedup.p95:.2f}, "
        "p5 to p95)"
    )


def _losses(own: Row, others: Sequence[Row]) -> list[str]:
    """Return where the bundle loses, beyond chance.

    In PSNR to what has equal MACs or takes no longer; in speed to what has equal MACs, or computes the full model
    exactly; to the full program itself.
    """
    assert own.timing and own.macs_ratio is not None and own.efficiency is not None  # noqa: PT018 - for mypy
    speedup, losses, faster = own.timing.speedup.median, [], []
    for row in others:
        if row.timing is None:
            continue
        low, high = _speed_interval(row, own)
        times = (row.macs_ratio or np.inf) / own.macs_ratio
        lead = _psnr_lead(row, own)
        if lead and lead[1] > 0 and (times <= EQUAL or 1 <= high < np.inf):
            mean, least, most = lead
            losses.append(
                f"Loses to '{row.name}' in PSNR by {mean:.1f} dB per image ({least:.1f} to {most:.1f}), at "
                f"{row.timing.speedup.median:.2f} times the full program's speed against {speedup:.2f}."
            )
        elif low > 1 and (1 / EQUAL <= times <= EQUAL or row.agreement is not None):
            faster.append(f"'{row.name}' {row.timing.speedup.median:.2f}")
    if faster:
        losses.append(f"Loses in speed: {speedup:.2f} times the full program's, against {', '.join(faster)}.")
    if median_interval(own.timing.ratios)[1] < 1:
        losses.append(f"Slower than the full program: {speedup:.2f} times its speed.")
    if own.efficiency < POOR:
        losses.append(
            f"Efficiency {own.efficiency:.2f}: {own.macs_ratio:.1%} of the MACs take "
            f"{1 / speedup:.1%} of the full program's time."
        )
    return losses


def _speed_interval(row: Row, own: Row) -> tuple[float, float]:
    """Return the interval of how many times as fast as the bundle another program is, within rounds."""
    assert row.timing and own.timing  # noqa: PT018 - for mypy
    ratios = np.divide(own.timing.samples, row.timing.samples)
    return median_interval(ratios)


def _psnr_lead(row: Row, own: Row) -> tuple[float, float, float] | None:
    """Return how many dB closer another program's images are, in the mean, with the interval."""
    if row.quality is None or own.quality is None or not own.quality.each_psnr_db:
        return None
    lead = np.subtract(row.quality.each_psnr_db, own.quality.each_psnr_db)
    return float(lead.mean()), *mean_interval(lead)


def _notes(model: ModelIdentity, rows: Sequence[Row], place: Environment) -> list[str]:
    notes = [f"Not measured: '{row.name}' ({row.error})." for row in rows if row.error]
    if place.load_at_start[0] > place.cores / 4:
        notes.append(
            f"The machine was not idle: load average {place.load_at_start[0]:.1f} on {place.cores} cores at the start."
        )
    if model.weights_sha256 is None:
        notes.append("Random weights: images are meaningless.")
    return notes
