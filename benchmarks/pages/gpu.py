"""What was measured on GPUs, as tables: records of ``dipgo.gpu/2``, a step of ``make gpu`` each, and older reports.

Those are of ``dipgo.gpu/1``, written by a benchmark of a private loop that is no more: a line a pair.
"""

from __future__ import annotations

import re
from typing import Any

SCHEMA, STEP_SCHEMA = "dipgo.gpu/1", "dipgo.gpu/2"  # published in ``schemas/gpu-1.json`` and ``gpu-2.json``
REACH = r"; at least [\d.]+ (holds|does not hold)"  # in a first line, of the speed that was hoped for


def table(report: dict[str, Any], source: str) -> str:
    """Return the pairs of a report as markdown; ``source`` is the path of its JSON."""
    calls = [call for call in report["calls"] if call]
    lines = [f"- {re.sub(REACH, '', line)}" for line in report["headline"]]
    lines += [
        "",
        "| case | baseline | MACs | wall time | baseline's | speedup | device speedup | efficiency |",
        "|---|---|---|---|---|---|---|---|",
        *map(_line, report["cases"]),
    ]
    devices = ", ".join(dict.fromkeys(str(call["machine"]["device"]) for call in calls))
    commands = "; ".join(dict.fromkeys(f"`{call['command']}`" for call in calls))
    return "\n".join([*lines, "", f"{commands} on {devices}. From [{source}]({source})."])


def _line(case: dict[str, Any]) -> str:
    head = f"| {case['name']} | {case['baseline']}"
    if case["status"] == "not reached":
        return f"{head} | not measured yet | | | | | |"
    if case["status"] != "measured":
        return f"{head} | {case['status']}: {case.get('error') or 'no reason given'} | | | | | |"
    own, baseline = (case[name]["wall"]["median"] * 1e3 for name in ("candidate_figures", "baseline_figures"))
    device = format(case["device_speedup"]["median"], ".2f") if case.get("device_speedup") else ""
    return (
        f"{head} | {case['macs_ratio']:.1%} | {own:.1f} ms | {baseline:.1f} ms | {case['speedup']['median']:.2f} | "
        f"{device} | {case['efficiency']:.2f} |"
    )


def step_table(record: dict[str, Any], source: str) -> str:
    """Return the programs and searches of a step as markdown; what failed says why."""
    lines = [f"{record['about']}. {record['device']}; random weights: images are meaningless."]
    if record["rows"]:
        lines += [
            "",
            "| program | backend | MACs | time | to eager | launches | parity |",
            "|---|---|---|---|---|---|---|",
        ]
    lines += map(_program, record["rows"])
    if record["searches"]:
        lines += ["", "| search by | precision | batch | iterations per minute | memory | a whole search |"]
        lines += ["|---|---|---|---|---|---|", *map(_search, record["searches"])]
    if record["error"]:
        lines += ["", f"Failed: {record['error']}."]
    return "\n".join([*lines, "", f"`{record['command']}`. From [{source}]({source})."])


def _program(row: dict[str, Any]) -> str:
    head, timing, parity = f"| {row['program']} | {row['backend']} |", row["timing"], row["parity"]
    macs = f"{row['macs_ratio']:.1%}" if row["macs_ratio"] else ""
    if row["error"] or not timing:
        return f"{head} {macs} | failed: {row['error'] or 'not timed'} | | | |"
    error = f"{parity['relative_error_latent']:.1e} of {parity['tolerance']:.1e}" if parity else ""
    time, speed = timing["wall"]["median"] * 1e3, timing["speedup"]["median"]
    return f"{head} {macs} | {time:.1f} ms | {speed:.2f} | {row['launches'] or ''} | {error} |"


def _search(row: dict[str, Any]) -> str:
    head = f"| {row['sites']} | {row['precision']} | {row['batch']} |"
    if row["error"]:
        return f"{head} failed: {row['error']} | | |"
    memory, hours = row["peak_bytes"] / 1e9, row["seconds"] / 3600
    return f"{head} {row['iterations_per_minute']:.1f} | {memory:.1f} GB | {hours:.1f} hours |"
