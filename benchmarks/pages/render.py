"""One committed result as markdown, by its kind; what has no kind of its own as tables of its figures."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.bench.page import summary
from benchmarks.bench.report import SCHEMA, ReportRecord
from benchmarks.pages import gpu
from benchmarks.pages.figures import tables
from benchmarks.studies import dummy_record, export_table, search_record
from dipgo.base.errors import DipgoError
from dipgo.base.records import read_json

Raw = dict[str, Any]
TRADE_FIRST = {"result": 0, "loss": 1, "note": 2}
GPU = {gpu.SCHEMA: gpu.table, gpu.STEP_SCHEMA: gpu.step_table}
STUDIES: tuple[tuple[str, Any, Callable[[Any, str], str]], ...] = (  # by a field that no other has
    ("cells", search_record.TableRecord, search_record.markdown),
    ("cases", export_table.ExportRecord, export_table.markdown),
    ("counts", dummy_record.Dummies, dummy_record.markdown),
)
TODAY = {  # what records from before a renaming say, as it is called now
    r"fixed policy": "fixed schedule",
    r"fixed policies": "fixed schedules",
    r"benchmarks\.(?=(search|export|session)_\w+ |load |binding_times )": "benchmarks.studies.",
    r" --publish(?: search[\w-]*)?(?= |`)": "",
}


def markdown(path: Path, source: str) -> str:
    """Return the table of a JSON file, ``source`` in the page's links, with where and at which commit it was measured.

    Raises:
        DipgoError: a result that cannot be read or shown.
    """
    raw = read_json(path, "result")
    try:
        text = _shown(raw, source).replace(f"[{source}]", f"[{path.name}]")
    except (KeyError, TypeError, ValueError) as error:  # pydantic's is a ValueError
        raise DipgoError(f"{path}: not a result that can be shown ({' '.join(str(error).split())[:120]})") from error
    return f"{today(text)}\n\n{origin(raw)}."


def today(text: str) -> str:
    """Return a text with today's names of modules, options and rows."""
    for old, new in TODAY.items():
        text = re.sub(old, new, text)
    return text


def origin(raw: Raw) -> str:
    """Return the commit and the machine that a result comes from."""
    place = raw.get("environment", {})
    commits = [place.get("commit"), *(call.get("commit") for call in raw.get("calls", []) if isinstance(call, dict))]
    commit = next((each for each in commits if each), None)
    machine = [f"{place['cpu']}, {place['cores']} cores"] if place else []
    return "; ".join([f"commit {commit}" if commit else "commit not recorded", *machine])


def _shown(raw: Raw, source: str) -> str:
    schema = raw.get("schema")
    if schema == SCHEMA:  # with the trade before the losses
        report = ReportRecord.model_validate(raw)
        ordered = sorted(report.headline, key=lambda headline: TRADE_FIRST[headline.kind])
        return summary(report.model_copy(update={"headline": ordered}), source)
    if schema in GPU:
        return GPU[schema](raw, source)
    for key, kind, shown in () if schema else STUDIES:
        if key in raw:
            return shown(kind.model_validate(raw), source)
    figures = {name: value for name, value in raw.items() if name not in ("command", "environment")}
    command = f"`{raw['command']}`. " if "command" in raw else ""
    return "\n".join([*tables(figures), "", f"{command}From [{source}]({source})."])
