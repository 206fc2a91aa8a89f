"""Two reports side by side, and whether they differ by more than chance.

Speed: the rounds of each report are resampled and the medians' ratio taken (percentile bootstrap). What is compared is
each program's speedup, a ratio within rounds, since wall times of two runs are of two states of a machine. Quality: the
images of both are the same seeds, so their PSNR are resampled in pairs. The intervals hold together at 95 %
(Bonferroni), so that many programs do not make one of them differ by chance; fewer than six rounds or images have none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.bench.chance import CHANCE, RESAMPLES, between, mean_interval
from benchmarks.bench.page import aligned, template
from benchmarks.bench.report import RECORD_FILE, ReportRecord, Row, milliseconds, read_report
from dipgo.base.errors import DipgoError
from dipgo.base.files import Kind, new_folder

NAMES = ("comparison.html", "comparison.md")
COMPARISON = Kind(NAMES[0], lambda folder: NAMES)


@dataclass(frozen=True)
class Change:
    """From the first report's value to the second's, with the bootstrap interval of the change.

    ``neutral`` is what no change looks like: 1 for a ratio, 0 for a difference. The interval is infinite where too
    little was measured for one.
    """

    first: float
    second: float
    change: float
    low: float
    high: float
    neutral: float

    @property
    def significant(self) -> bool:
        return not self.low <= self.neutral <= self.high


@dataclass(frozen=True)
class Pair:
    """One program in both reports; what one of them lacks is None, and ``note`` says what."""

    name: str
    wall: tuple[float | None, float | None]
    speedup: Change | None
    psnr: Change | None
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """Two reports, and every program that is in either."""

    first: ReportRecord
    second: ReportRecord
    pairs: list[Pair]

    @property
    def lines(self) -> list[str]:
        """What to bear in mind, then what differs: the largest difference of a speedup, and those beyond chance."""
        lines = list(_mismatches(self.first, self.second))
        moved = [pair for pair in self.pairs if pair.speedup]
        if moved:
            most = max(moved, key=lambda pair: abs(pair.speedup.change - 1) if pair.speedup else 0)
            assert most.speedup
            lines.append(f"Largest difference of a speedup: {most.speedup.change - 1:+.1%} ('{most.name}').")
        for pair in moved:
            if pair.speedup and pair.speedup.significant:
                word = "faster" if pair.speedup.change > 1 else "slower"
                lines.append(
                    f"'{pair.name}' is {word}, beyond chance: speedup {pair.speedup.first:.2f} to "
                    f"{pair.speedup.second:.2f} ({pair.speedup.change - 1:+.1%}, 95% interval "
                    f"{pair.speedup.low - 1:+.1%} to {pair.speedup.high - 1:+.1%})."
                )
        for pair in self.pairs:
            if pair.psnr and pair.psnr.significant:
                word = "better" if pair.psnr.change > 0 else "worse"
                lines.append(
                    f"'{pair.name}' is {word} in PSNR, beyond chance: {pair.psnr.change:+.2f} dB, 95% interval "
                    f"{pair.psnr.low:+.2f} to {pair.psnr.high:+.2f}."
                )
        return lines


def compare(first: Path, second: Path) -> Comparison:
    """Compare two reports, given as folders or as their JSON.

    Raises:
        DipgoError: not a report.
    """
    a, b = (_read(path) for path in (first, second))
    names = list(dict.fromkeys(row.name for row in [*a.rows, *b.rows]))
    rows = [{row.name: row for row in report.rows} for report in (a, b)]
    chance = CHANCE / (2 * len(names))  # each has a speedup and a PSNR
    return Comparison(a, b, [_pair(name, rows[0].get(name), rows[1].get(name), chance) for name in names])


def write_comparison(comparison: Comparison, folder: Path, force: bool = False) -> None:
    """Write ``comparison.html`` and ``comparison.md`` into ``folder``, whole or not at all."""
    with new_folder(folder, force, COMPARISON) as draft:
        page = template("comparison.html").render(comparison=comparison, cells=_cells)
        (draft / NAMES[0]).write_text(page)
        (draft / NAMES[1]).write_text(_markdown(comparison) + "\n")


def text(comparison: Comparison) -> str:
    """Return the comparison as a text table with its lines below."""
    return "\n".join([*aligned([_HEADER, *map(_cells, comparison.pairs)]), *comparison.lines])


_HEADER = ("program", "wall A", "wall B", "speedup A", "speedup B", "change", "95% interval", "PSNR change")


def _cells(pair: Pair) -> tuple[str, ...]:
    if pair.speedup is None:
        return (pair.name, pair.note, "", "", "", "", "", "")
    first, second = ("" if value is None else milliseconds(value) for value in pair.wall)
    change = pair.speedup
    star = " *" if change.significant else ""
    psnr = "" if pair.psnr is None else f"{pair.psnr.change:+.2f} dB{' *' if pair.psnr.significant else ''}"
    return (
        pair.name,
        first,
        second,
        f"{change.first:.2f}",
        f"{change.second:.2f}",
        f"{change.change - 1:+.1%}{star}",
        f"{change.low - 1:+.1%} to {change.high - 1:+.1%}" if np.isfinite(change.low) else "too few rounds",
        psnr,
    )


def _markdown(comparison: Comparison) -> str:
    lines = [f"- {line}" for line in comparison.lines]
    lines += ["", f"| {' | '.join(_HEADER)} |", "|---" * len(_HEADER) + "|"]
    lines += [f"| {' | '.join(_cells(pair))} |" for pair in comparison.pairs]
    for letter, report in (("A", comparison.first), ("B", comparison.second)):
        lines += ["", f"{letter}: `{report.command}`, {report.created}; {report.environment.cpu}."]
    return "\n".join([*lines, "", "\\* beyond chance (bootstrap, 95% for all of them together)."])


def _read(path: Path) -> ReportRecord:
    if not path.exists():
        raise DipgoError(f"{path}: no such report; make one with 'dipgo bench'")
    return read_report(path / RECORD_FILE if path.is_dir() else path)


def _pair(name: str, first: Row | None, second: Row | None, chance: float) -> Pair:
    for row, letter in ((first, "A"), (second, "B")):
        if row is None or row.timing is None:
            why = "not in it" if row is None else row.error
            return Pair(name, (None, None), None, None, f"not measured in {letter}: {why}")
    assert first and second and first.timing and second.timing  # noqa: PT018 - for mypy
    return Pair(
        name,
        (first.timing.wall.median, second.timing.wall.median),
        _speedup(first, second, chance),
        _psnr(first, second, chance),
    )


def _speedup(first: Row, second: Row, chance: float) -> Change | None:
    """Compare the medians of the rounds' own ratios; None where a report has none."""
    assert first.timing and second.timing  # noqa: PT018 - for mypy
    a, b = (np.array(row.timing.ratios) for row in (first, second) if row.timing)
    if not len(a) or not len(b):
        return None
    generator = np.random.default_rng(0)
    medians = [
        np.median(values[generator.integers(len(values), size=(RESAMPLES, len(values)))], axis=1) for values in (a, b)
    ]
    low, high = between(medians[1] / medians[0], min(len(a), len(b)), chance)
    before, after = float(np.median(a)), float(np.median(b))
    return Change(before, after, after / before, low, high, 1.0)


def _psnr(first: Row, second: Row, chance: float) -> Change | None:
    a, b = ((row.quality.each_psnr_db if row.quality else []) for row in (first, second))
    if not a or len(a) != len(b):
        return None
    difference = np.array(b) - np.array(a)
    low, high = mean_interval(difference, chance)
    return Change(float(np.mean(a)), float(np.mean(b)), float(difference.mean()), low, high, 0.0)


def _mismatches(first: ReportRecord, second: ReportRecord) -> Sequence[str]:
    """Return in what the two measured different things."""
    lines = []
    for what, a, b in (
        ("processors", first.environment.cpu, second.environment.cpu),
        ("GPUs", first.environment.gpu, second.environment.gpu),
        ("models", first.model.name, second.model.name),
        ("scopes", first.scope, second.scope),
        ("seeds", first.seeds, second.seeds),
        ("gates", first.gates, second.gates),
    ):
        if a != b:
            shown = "" if what == "gates" else f": {a} and {b}"
            lines.append(f"The reports are on different {what}{shown}.")
    return lines
