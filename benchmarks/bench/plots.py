"""Plots of a report, drawn by matplotlib as inline SVG: colours come from the page's style sheet, texts stay texts."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse, Rectangle
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator
from matplotlib.transforms import IdentityTransform

from benchmarks.bench.report import SUBJECT, Row, milliseconds

EXACT_DB = 80.0  # from here on images differ by rounding alone; such programs are drawn on a line of their own
RADIUS = 5  # of a dot, in pixels
MAP_WIDTH = 1060  # of the gate map with its labels, in pixels; long trajectories may exceed it
LETTER = 6.1  # width of a monospaced letter at 10 pixels
COLOURS: Mapping[str, str] = {  # what matplotlib is told, and what the style sheet calls it
    name: f"#0000{number:02x}" for number, name in enumerate(("on", "off", "dot", "line", "quiet", "text"), 1)
}
_RC: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "dipgo", "text.color": COLOURS["quiet"], "font.size": 12}


@dataclass(frozen=True)
class Point:
    """A program in the plot: its wall time in seconds, its PSNR in dB, and the curve that it lies on, if on any."""

    number: int
    name: str
    seconds: float
    psnr: float
    subject: bool
    curve: str | None = None


class Drawing:
    """One plot of a size in pixels, with margins left, right, above and below its axes.

    Attributes:
        axes: matplotlib's.
    """

    def __init__(self, width: float, height: float, margins: tuple[float, float, float, float]) -> None:
        left, right, top, bottom = margins
        self.width, self.height = width, height
        self._figure = Figure(figsize=(width / 72, height / 72), dpi=72)
        place = (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
        self.axes = self._figure.add_axes(place, frameon=False)
        self.axes.tick_params(length=0, labelcolor=COLOURS["quiet"], pad=6)
        self._marks: list[tuple[str, str]] = []

    def add(self, patch: Any, kind: str, title: str) -> None:
        """Add a patch of a class of the style sheet; the title is shown where the pointer rests on it."""
        self.mark(patch, kind, title)
        self.axes.add_patch(patch).set_clip_on(False)

    def mark(self, artist: Any, kind: str, title: str) -> None:
        """Give what is drawn already a class and a title."""
        artist.set(gid=f"mark-{len(self._marks)}", clip_on=False)
        self._marks.append((kind, title))

    def svg(self, kind: str, label: str, style: str = "") -> str:
        """Return the ``<svg>`` element, with a class and a label for those who do not see it."""
        stream = io.StringIO()
        self._figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
        body = stream.getvalue().partition("</metadata>")[2].rpartition("</svg>")[0]
        body = re.sub(r"<defs>.*?</defs>", "", body, flags=re.DOTALL)
        body = re.sub(r'<g id="mark-(\d+)">', lambda match: self._opening(*self._marks[int(match[1])]), body)
        body = re.sub(r' id="[^"]*"|<!--.*?-->', "", body)
        body = re.sub(r"font-family: [^;\"]*;? ?|<g/>", "", body)
        for name, colour in COLOURS.items():
            body = body.replace(colour, f"var(--{name})")
        return (
            f'<svg class="{kind}" width="{self.width:.0f}" height="{self.height:.0f}" style="{style}" '
            f'viewBox="0 0 {self.width:.0f} {self.height:.0f}" role="img" aria-label="{escape(label)}">{body}</svg>'
        )

    @staticmethod
    def _opening(kind: str, title: str) -> str:
        return f'<g class="{kind}"><title>{escape(title)}</title>'


def points_of(rows: Sequence[Row]) -> list[Point]:
    """Return the rows that have both speed and quality, numbered as in the report's tables."""
    return [
        Point(number, row.name, row.timing.wall.median, row.quality.psnr_db, row.name == SUBJECT, row.curve)
        for number, row in enumerate(rows, 1)
        if row.timing and row.quality
    ]


def curves_of(points: Sequence[Point]) -> dict[str, list[Point]]:
    """Return the points of each curve that has two or more, the fastest first.

    A curve of step counts ends in the full program, one of budgets does not.
    """
    curves: dict[str, list[Point]] = {}
    for point in sorted(points, key=lambda point: point.seconds):
        if point.curve:
            curves.setdefault(point.curve, []).append(point)
    return {name: line for name, line in curves.items() if len(line) > 1}


@rc_context(_RC)
def trade(rows: Sequence[Row]) -> str:
    """Draw PSNR against wall time, a numbered dot a program, curves through step counts and budgets.

    Time is logarithmic. Exact programs lie on the line at the top.
    """
    points = points_of(rows)
    if not points:
        return ""
    finite = [point.psnr for point in points if point.psnr < EXACT_DB] or [30.0]
    low, high = math.floor(min(finite) - 2), math.ceil(max(finite) + 2)
    exact = high + max(2.0, (high - low) * 0.12)
    drawing = Drawing(560, 380, (62, 16, 28, 46))
    axes = drawing.axes
    times = [point.seconds * 1e3 for point in points]
    axes.set(xscale="log", xlim=(min(times) / 1.12, max(times) * 1.12), ylim=(low, exact))
    axes.set_xlabel("wall time of the loop, ms (logarithmic)", color=COLOURS["quiet"])
    axes.set_ylabel("PSNR, dB", color=COLOURS["quiet"])
    marks = _round_numbers(*axes.get_xlim())
    axes.xaxis.set(
        major_locator=FixedLocator(marks),
        major_formatter=FixedFormatter([f"{mark:g}" for mark in marks]),
        minor_locator=NullLocator(),
    )
    levels = [level for level in MaxNLocator(6).tick_values(low, high) if low <= level <= high]
    axes.yaxis.set(
        major_locator=FixedLocator([*levels, exact]),
        major_formatter=FixedFormatter([*(f"{level:g}" for level in levels), "exact"]),
    )
    for level in levels:
        axes.axhline(level, color=COLOURS["line"], linewidth=1, clip_on=False)
    axes.axhline(exact, color=COLOURS["quiet"], linewidth=1, dashes=(2, 4), clip_on=False)
    places = {point: (point.seconds * 1e3, exact if point.psnr >= EXACT_DB else point.psnr) for point in points}
    for name, curve in curves_of(points).items():
        own = any(point.subject for point in curve)
        (line,) = axes.plot(
            *zip(*(places[point] for point in curve), strict=True),
            color=COLOURS["on" if own else "dot"],
            linewidth=1.5,
            alpha=0.6,
        )
        drawing.mark(line, "curve", name)
    pixels = {point: tuple(axes.transData.transform(place)) for point, place in places.items()}
    labels: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda point: (point.subject, -point.number)):
        colour = COLOURS["on" if point.subject else "dot"]
        dot = Ellipse(pixels[point], 2 * RADIUS, 2 * RADIUS, transform=IdentityTransform(), facecolor=colour, zorder=3)
        title = f"{point.name}: {milliseconds(point.seconds)}, {point.psnr:.1f} dB"
        drawing.add(dot, "dot subject" if point.subject else "dot", title)
        label = _free_place(pixels[point], [*pixels.values(), *labels])
        labels.append(label)
        axes.annotate(
            str(point.number),
            (label[0], label[1] - 4),
            xycoords="figure pixels",
            ha="center",
            color=COLOURS["text"],
            weight="bold" if point.subject else "normal",
        )
    return drawing.svg("plot", f"PSNR against wall time of {len(points)} programs")


def _round_numbers(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times powers of ten within a range."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [mark * 10.0**power for power in powers for mark in (1, 2, 5) if low <= mark * 10.0**power <= high]


@rc_context(_RC)
def step_bars(own: Sequence[float], full: Sequence[float] | None) -> str:
    """Draw the seconds of each step as bars, the full program's behind where it has as many steps."""
    behind = list(full) if full and len(full) == len(own) else []
    steps, left, right = len(own), 58, 20
    across = min(36.0, max(7.0, (720 - left - right) / steps))
    drawing = Drawing(left + across * steps + right, 220, (left, right, 14, 46))
    axes = drawing.axes
    axes.set(xlim=(-0.5, steps - 0.5), ylim=(0, max([*own, *behind]) * 1.05e3))
    axes.set_xlabel("step of the sampler", color=COLOURS["quiet"])
    axes.set_ylabel("ms", color=COLOURS["quiet"])
    axes.xaxis.set_major_locator(FixedLocator(range(0, steps, _every(across))))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.grid(axis="y", color=COLOURS["line"], clip_on=False)
    axes.set_axisbelow(True)
    for kind, seconds, name, width, colour in (("theirs", behind, "full ", 0.95, "off"), ("mine", own, "", 0.57, "on")):
        for step, value in enumerate(seconds):
            bar = Rectangle((step - width / 2, 0), width, value * 1e3, facecolor=COLOURS[colour], zorder=2)
            drawing.add(bar, kind, f"step {step}: {name}{milliseconds(value)}")
    return drawing.svg("plot", f"Seconds of each of {steps} steps", f"min-width:520px;max-width:{drawing.width:.0f}px")


@rc_context(_RC | {"font.size": 10})
def heatmap(gates: Sequence[Sequence[int]], sites: Sequence[str], timesteps: Sequence[float]) -> str:
    """Draw ``gates`` ``[steps][sites]``: a row a site, a column a step, of class ``on`` (computed) or ``off``."""
    steps, left, right = len(gates), round(max(map(len, sites)) * LETTER) + 10, 48
    across = min(30, max(9, (MAP_WIDTH - left - right) // steps))
    down = min(20, max(12, 420 // len(sites)))
    drawing = Drawing(left + steps * across + right, 4 + len(sites) * down + 36, (left, right, 4, 36))
    axes = drawing.axes
    axes.set(xlim=(0, steps), ylim=(len(sites), 0))
    axes.set_xlabel("step of the sampler", color=COLOURS["quiet"])
    shown = range(0, steps, _every(across))
    axes.xaxis.set(
        major_locator=FixedLocator([step + 0.5 for step in shown]),
        major_formatter=FixedFormatter([str(step) for step in shown]),
    )
    axes.set_yticks([row + 0.5 for row in range(len(sites))], sites)
    for row, site in enumerate(sites):
        computed = sum(gates[step][row] for step in range(steps))
        axes.text(steps + 6 / across, row + 0.5, f"{computed}/{steps}", va="center_baseline")
        for step in range(steps):
            state, word = ("on", "computed") if gates[step][row] else ("off", "reused")
            cell = Rectangle((step, row), 1 - 1 / across, 1 - 1 / down, facecolor=COLOURS[state])
            drawing.add(cell, state, f"step {step} (t = {timesteps[step]:g}), {site}: {word}")
    return drawing.svg("map", f"Gates: {len(sites)} sites by {steps} steps")


def _free_place(dot: tuple[float, float], others: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return where a dot's label goes, in pixels: beside it, where it is farthest from other dots and labels."""
    around = [(dot[0] + 15 * math.cos(turn), dot[1] + 15 * math.sin(turn)) for turn in (1.57, 0, 4.71, 3.14, 0.8, 2.4)]
    return max(around, key=lambda place: min(20.0, *(math.dist(place, other) for other in others if other != dot), 20))


def _every(across: float) -> int:
    """Return which steps have their number below them, so that the numbers do not touch."""
    return next(count for count in (1, 2, 5, 10, 20, 50, 100, 1000) if count * across >= 22)
