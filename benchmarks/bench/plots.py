"""Plots of a report as inline SVG. Colours come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from benchmarks.bench.report import SUBJECT, Row, milliseconds

WIDTH, HEIGHT = 720, 380
LEFT, RIGHT, TOP, BOTTOM = 58, 20, 14, 46
EXACT_DB = 80.0  # from here on images differ by rounding alone; such programs are drawn on a line of their own


@dataclass(frozen=True)
class Point:
    """A program in the plot: how many times the full program's speed, and its PSNR in dB."""

    number: int
    name: str
    speedup: float
    psnr: float
    subject: bool


def points_of(rows: Sequence[Row]) -> list[Point]:
    """Return the rows that have both speed and quality, numbered as in the report's tables."""
    return [
        Point(number, row.name, row.timing.speedup.median, row.quality.psnr_db, row.name == SUBJECT)
        for number, row in enumerate(rows, 1)
        if row.timing and row.quality
    ]


def frontier(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other one beats in both speed and PSNR, the slowest first."""
    best = [
        one
        for one in points
        if not any(
            other.speedup >= one.speedup
            and other.psnr >= one.psnr
            and (other.speedup, other.psnr) != (one.speedup, one.psnr)
            for other in points
        )
    ]
    return sorted(best, key=lambda point: point.speedup)


def pareto(rows: Sequence[Row]) -> str:
    """Draw speed against PSNR, a numbered circle a program; exact programs lie on the line at the top."""
    points = points_of(rows)
    if not points:
        return ""
    finite = [point.psnr for point in points if point.psnr < EXACT_DB] or [30.0]
    low, high = math.floor(min(finite) - 2), math.ceil(max(finite) + 2)
    exact = high + max(2.0, (high - low) * 0.12)
    right = max(point.speedup for point in points) * 1.08
    left = min([0.0, *(point.speedup for point in points)])

    def x(speedup: float) -> float:
        return LEFT + (speedup - left) / (right - left) * (WIDTH - LEFT - RIGHT)

    def y(psnr: float) -> float:
        shown = exact if psnr >= EXACT_DB else psnr
        return TOP + (exact - shown) / (exact - low) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="Speed against PSNR of {len(points)} programs">'
    ]
    for value in _ticks(low, high):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>')
    parts.append(
        f'<line class="exact" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(EXACT_DB):.1f}" y2="{y(EXACT_DB):.1f}"/>'
    )
    parts.append(f'<text x="{LEFT - 8}" y="{y(EXACT_DB) + 4:.1f}" text-anchor="end">exact</text>')
    for value in _ticks(left, right):
        parts.append(f'<text x="{x(value):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{value:g}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">times the speed of the full program</text>')
    parts.append(
        f'<text x="14" y="{HEIGHT / 2}" text-anchor="middle" transform="rotate(-90 14 {HEIGHT / 2})">PSNR, dB</text>'
    )
    line = " ".join(f"{x(point.speedup):.1f},{y(point.psnr):.1f}" for point in frontier(points))
    parts.append(f'<polyline class="frontier" points="{line}"/>')
    taken: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda point: not point.subject):
        across, down = _free(x(point.speedup), y(point.psnr), taken)
        taken.append((across, down))
        kind = "dot subject" if point.subject else "dot"
        title = f"{point.name}: {point.speedup:.2f} times, {point.psnr:.1f} dB"
        parts.append(
            f'<g class="{kind}"><title>{escape(title)}</title><circle cx="{across:.1f}" cy="{down:.1f}" r="9"/>'
            f'<text x="{across:.1f}" y="{down + 3.5:.1f}" text-anchor="middle">{point.number}</text></g>'
        )
    parts.append("</svg>")
    return "\n".join(parts)


def step_bars(own: Sequence[float], full: Sequence[float] | None) -> str:
    """Draw the seconds of each step as bars, the full program's behind where it has as many steps."""
    behind = list(full) if full and len(full) == len(own) else [0.0] * len(own)
    across = min(36.0, max(7.0, (WIDTH - LEFT - RIGHT) / len(own)))
    width, height = LEFT + across * len(own) + RIGHT, 220
    top = max([*own, *behind]) * 1.05

    def y(seconds: float) -> float:
        return TOP + (1 - seconds / top) * (height - TOP - BOTTOM)

    base = height - BOTTOM
    parts = [
        f'<svg class="plot" style="max-width:{width:.0f}px" viewBox="0 0 {width:.0f} {height}" role="img" '
        f'aria-label="Seconds of each of {len(own)} steps">'
    ]
    for value in _ticks(0, top * 1e3, 4):
        level = y(value / 1e3)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT:.0f}" y1="{level:.1f}" y2="{level:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{level + 4:.1f}" text-anchor="end">{value:g}</text>')
    for step, (mine, theirs) in enumerate(zip(own, behind, strict=True)):
        left = LEFT + step * across
        text = f"step {step}: {milliseconds(mine)}" + (f", full {milliseconds(theirs)}" if theirs else "")
        parts.append(
            f"<g><title>{text}</title>"
            f'<rect class="theirs" x="{left:.1f}" y="{y(theirs):.1f}" width="{across - 1:.1f}" '
            f'height="{base - y(theirs):.1f}"/>'
            f'<rect class="mine" x="{left + across * 0.2:.1f}" y="{y(mine):.1f}" width="{across * 0.6 - 1:.1f}" '
            f'height="{base - y(mine):.1f}"/></g>'
        )
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100) if n * across >= 22)
    for step in range(0, len(own), every):
        parts.append(f'<text x="{LEFT + (step + 0.5) * across:.1f}" y="{base + 15}" text-anchor="middle">{step}</text>')
    parts.append(f'<text x="{width / 2:.0f}" y="{height - 10}" text-anchor="middle">step of the sampler</text>')
    parts.append(
        f'<text x="14" y="{base / 2:.0f}" text-anchor="middle" '
        f'transform="rotate(-90 14 {base / 2:.0f})">ms</text></svg>'
    )
    return "\n".join(parts)


def _free(across: float, down: float, taken: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Move a circle sideways until it hides no other."""
    for shift in (0, 19, -19, 38, -38, 57, -57):
        place = (across + shift, down)
        if LEFT <= place[0] <= WIDTH - 10 and all(math.dist(place, other) >= 18 for other in taken):
            return place
    return across, down


def _ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Return round numbers from ``low`` to ``high``, about ``count`` of them."""
    rough = (high - low) / count
    magnitude = 10 ** math.floor(math.log10(rough))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= rough)
    first = math.ceil(low / step)
    return [round(k * step, 10) for k in range(first, math.floor(high / step) + 1)]
