"""The report for people: its first lines, computed from the cases, and a table a workload."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from benchmarks.bench.report import milliseconds
from benchmarks.gpu.records import Call, CaseRecord, Figures, GpuReport

EXPECTED = 4.6
"""Times the full model in the same backend that the published SubNet is to reach; its MACs ratio is 5.0."""

_RIVALS = ("fewer-steps", "deepcache")


def headlines(records: Sequence[CaseRecord], calls: Sequence[Call], tiny: bool) -> list[str]:
    """Return the first lines: is the published SubNet as fast as expected, where does ours lose, what is missing?"""
    lines = ["Tiny configurations: these figures try the command and say nothing of real models."] if tiny else []
    devices = sorted({calls[record.call].machine.device for record in records if record.call is not None})
    lines += [*_published(records, tiny), *_losses(records)]
    lines += [f"Measured on {', '.join(devices)}; random weights: images are meaningless."] if devices else []
    for status, what in (("failed", "Failed"), ("skipped", "Skipped"), ("not reached", "Not reached")):
        names = [record.name for record in records if record.status == status]
        if names:
            lines.append(f"{what}: {len(names)} of {len(records)} cases ({_listed(names)}).")
    return lines


def _published(records: Sequence[CaseRecord], tiny: bool) -> list[str]:
    own = [record for record in records if record.program == "published"]
    lines = []
    for record in own:
        if record.status != "measured" or not record.speedup:
            lines.append(f"Published SubNet, {_place(record)}: {record.status} ({record.error}).")
            continue
        reached = record.speedup.median >= EXPECTED
        verdict = "" if tiny else f"; at least {EXPECTED} {'holds' if reached else 'does not hold'}"
        lines.append(
            f"Published SubNet, {_place(record)}: {record.speedup.median:.2f} times the full model in the same backend "
            f"(p5 to p95 {record.speedup.p5:.2f} to {record.speedup.p95:.2f}, {record.rounds} rounds){verdict}."
        )
    return sorted(lines, key=lambda line: "holds" not in line)


def _losses(records: Sequence[CaseRecord]) -> list[str]:
    """Return a line for each of our programs that is slower than the full one, or than a baseline of no more MACs."""
    measured = [record for record in records if record.status == "measured" and record.speedup]
    lines = []
    for mine in measured:
        if not mine.ours or not mine.speedup:
            continue
        if mine.speedup.median < 1:
            lines.append(f"Loses: {mine.name} has {mine.speedup.median:.2f} times the full model's speed.")
        for other in measured:
            comparable = (other.model, other.batch, other.backend) == (mine.model, mine.batch, mine.backend)
            if not comparable or not other.program.startswith(_RIVALS) or not other.speedup:
                continue
            if (other.macs or 0) <= 1.02 * (mine.macs or 0) and other.speedup.median > mine.speedup.median:
                lines.append(
                    f"Loses in speed: {mine.name} {mine.speedup.median:.2f} against {other.program} "
                    f"{other.speedup.median:.2f}, at {mine.macs_ratio:.1%} and {other.macs_ratio:.1%} of the MACs."
                )
    return lines


def markdown(report: GpuReport) -> str:
    """Return ``report.md``."""
    lines = ["# Speed on a GPU", "", *(f"- {line}" for line in report.headline), ""]
    for (model, batch, dtype), group in groupby(report.cases, key=lambda each: (each.model, each.batch, each.dtype)):
        lines += [f"## {model}, batch {batch}, {dtype}", "", *_table(list(group)), ""]
    lines += ["## Where and how", ""]
    for number, call in enumerate(report.calls):
        lines.append(f"- Call {number}: {_call(call)}")
    lines += [
        "- Each row is a pair, timed in turns in one process: the program, and the baseline named beside it. Speedup "
        "is the median of the rounds' own ratios of wall time, baseline over program, with p5 and p95; device time is "
        "between CUDA events; efficiency is speedup over 1 / MACs.",
        "- No speed without parity: final latents against the gated model by torch eager in the same dtype, tolerance "
        "twice that dtype's own rounding.",
        "",
    ]
    return "\n".join(lines)


def _table(records: Sequence[CaseRecord]) -> list[str]:
    lines = [
        "| backend | program | MACs | wall time | device time | baseline | its wall time | speedup | efficiency "
        "| parity | peak memory |",
        "|---" * 11 + "|",
    ]
    for record in records:
        name = f"**{record.program}**" if record.ours else record.program
        head = f"| {record.backend} | {name} |"
        own, other = record.candidate_figures, record.baseline_figures
        if record.status != "measured" or not (own and other and record.speedup and record.parity):
            text = (record.error or "").replace("|", "\\|")
            lines.append(f"{head} {record.status}: {text} |" + " |" * 8)
            continue
        cells = [
            f"{record.macs_ratio:.1%}",
            milliseconds(own.wall.median),
            milliseconds(own.device.median) if own.device else "",
            record.baseline,
            milliseconds(other.wall.median),
            f"{record.speedup.median:.2f} ({record.speedup.p5:.2f} to {record.speedup.p95:.2f})",
            f"{record.efficiency:.2f}",
            f"{record.parity.error:.0e} of {record.parity.tolerance:.0e}",
            _memory(own),
        ]
        lines.append(f"{head} {' | '.join(cells)} |")
    return lines


def _call(call: Call) -> str:
    place = call.machine
    parts = [place.device, f"driver {place.driver}" if place.driver else ""]
    parts += [f"power limit {place.power_limit:.0f} W" if place.power_limit else ""]
    parts += [f"up to {place.max_sm_clock:.0f} MHz" if place.max_sm_clock else ""]
    parts += [f"{place.cpu}, {place.cores} cores, load {place.load_average:.1f}", f"Python {place.python}"]
    parts += [f"{name} {number}" for name, number in place.versions.items()]
    parts += [f"{call.seconds:.0f} s" if call.seconds is not None else "did not end by itself", f"`{call.command}`"]
    return "; ".join(part for part in parts if part)


def _memory(figures: Figures) -> str:
    return f"{figures.peak_bytes / 1e9:.2f} GB" if figures.peak_bytes is not None else ""


def _place(record: CaseRecord) -> str:
    return f"{record.model} batch {record.batch}, {record.backend}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
