"""The gate map as inline SVG: a row a site, a column a step. Colours come from the page's style sheet."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

WIDTH = 1060  # of the map with its labels, in pixels; long trajectories may exceed it
SMALLEST, LARGEST = 9, 30  # width of a cell
LETTER = 6.1  # width of a monospaced letter at 10 pixels


def heatmap(gates: Sequence[Sequence[int]], sites: Sequence[str], timesteps: Sequence[float]) -> str:
    """Draw ``gates`` ``[steps][sites]``: one ``rect`` of class ``on`` (computed) or ``off`` (reused) a gate."""
    steps = len(gates)
    left, right, top = round(max(map(len, sites)) * LETTER) + 10, 48, 4
    across = min(LARGEST, max(SMALLEST, (WIDTH - left - right) // steps))
    down = min(20, max(12, 420 // len(sites)))
    width, height = left + steps * across + right, top + len(sites) * down + 34
    parts = [
        f'<svg class="map" width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="Gates: {len(sites)} sites by {steps} steps">'
    ]
    for row, site in enumerate(sites):
        y = top + row * down
        middle = y + down / 2 + 3.5
        kept = sum(gates[step][row] for step in range(steps))
        parts.append(f'<text x="{left - 6}" y="{middle:g}" text-anchor="end">{escape(site)}</text>')
        for step in range(steps):
            state, word = ("on", "computed") if gates[step][row] else ("off", "reused")
            parts.append(
                f'<rect class="{state}" x="{left + step * across}" y="{y}" width="{across - 1}" height="{down - 1}">'
                f"<title>step {step} (t = {timesteps[step]:g}), {escape(site)}: {word}</title></rect>"
            )
        parts.append(f'<text x="{left + steps * across + 6}" y="{middle:g}">{kept}/{steps}</text>')
    base = top + len(sites) * down
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100) if n * across >= 22)
    for step in range(0, steps, every):
        centre = left + step * across + (across - 1) / 2
        parts.append(f'<text x="{centre:g}" y="{base + 13}" text-anchor="middle">{step}</text>')
    centre = left + steps * across / 2
    parts.append(f'<text x="{centre:g}" y="{base + 29}" text-anchor="middle">step of the sampler</text></svg>')
    return "\n".join(parts)
