"""Reports of ``dipgo.gpu/1``, written by a benchmark of a private loop that is no more, as a table: a line a pair."""

from __future__ import annotations

import re
from typing import Any

SCHEMA = "dipgo.gpu/1"  # published in ``schemas/gpu-1.json``
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
