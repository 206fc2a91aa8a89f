"""All measured tables in one file: RESULTS.md, made from the committed ``results/*.json``. Nothing in it is typed.

python -m benchmarks.results            write RESULTS.md
python -m benchmarks.results --check    fail where it is not what would be written
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.bench.page import summary
from benchmarks.bench.report import SCHEMA, ReportRecord
from benchmarks.bench.suite import DEFAULT, FOLDER
from benchmarks.pages import gpu
from benchmarks.pages.figures import tables
from benchmarks.studies import export_table, search_record
from dipgo.base.errors import DipgoError
from dipgo.base.files import new_file
from dipgo.base.records import read_json

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
OUTPUT = ROOT / "benchmarks" / "RESULTS.md"

Raw = dict[str, Any]


@dataclass(frozen=True)
class Section:
    """A part of the file.

    Attributes:
        title: its heading.
        wanted: whether a result belongs to it.
        render: a result and its path to markdown.
        command: what would measure it; None where nothing does any more, and the section is of what was.
    """

    title: str
    wanted: Callable[[Raw], bool]
    render: Callable[[Raw, str], str]
    command: str | None = None


def sections() -> list[Section]:
    """Return the sections in order; the last takes every result that no other one takes."""
    made = [
        Section(
            "Searches against every fixed policy",
            lambda raw: "cells" in raw,
            lambda raw, source: search_record.markdown(search_record.TableRecord.model_validate(raw), source),
            "python -m benchmarks.studies.search_table build/search -o benchmarks/results/search-digits-dit-ddim.json",
        )
    ]
    for path in sorted(FOLDER.glob("*.yaml"), key=lambda path: (path.stem != DEFAULT, path.stem)):
        made.append(_suite(path))
    made.append(Section("GPU", lambda raw: raw.get("schema") == gpu.SCHEMA and not raw["tiny"], gpu.table))
    made.append(
        Section(
            "Exports at true size",
            lambda raw: "cases" in raw and "schema" not in raw,
            lambda raw, source: export_table.markdown(export_table.ExportRecord.model_validate(raw), source),
            "python -m benchmarks.studies.export_table -o benchmarks/results/export.json",
        )
    )
    return made


def text() -> str:
    """Return RESULTS.md.

    Raises:
        DipgoError: a result that cannot be read.
    """
    left = {path: read_json(path, "result") for path in sorted(RESULTS.glob("*.json"))}
    parts = ["# Results", "", "Written by `python -m benchmarks.results` from the files in `results/`."]
    for section in sections():
        mine = {path: raw for path, raw in left.items() if section.wanted(raw)}
        if not mine and section.command is None:
            continue
        parts += ["", f"## {section.title}"]
        for path, raw in mine.items():
            del left[path]
            parts += ["", *_placed(path, raw, section.render)]
        if not mine:
            parts += ["", f"| command | |\n|---|---|\n| `{section.command}` | not measured yet |"]
    if left:
        parts += ["", "## Further"]
        for path, raw in left.items():
            parts += ["", *_placed(path, raw, _figures)]
    return "\n".join(parts) + "\n"


def _placed(path: Path, raw: Raw, render: Callable[[Raw, str], str]) -> list[str]:
    """Return a result's heading, table and origin."""
    source = f"results/{path.name}"
    try:
        table = render(raw, source)
    except (KeyError, TypeError, ValueError) as error:  # pydantic's is a ValueError
        raise DipgoError(f"{path}: not a result that can be shown ({' '.join(str(error).split())[:120]})") from error
    place = raw.get("environment", {})
    commits = [place.get("commit"), *(call.get("commit") for call in raw.get("calls", []) if isinstance(call, dict))]
    commit = next((each for each in commits if each), None)
    machine = f"{place['cpu']}, {place['cores']} cores" if place else ""
    origin = [f"commit {commit}" if commit else "commit not recorded", *[machine] * bool(machine)]
    return [f"### {path.stem}", "", table, "", f"{'; '.join(origin)}."]


def _suite(path: Path) -> Section:
    """Return the section of a suite's reports: those of no suite are from before there were any."""
    lines = path.read_text().splitlines()
    commands = [line.removeprefix("# ") for line in lines if line.startswith("# dipgo bench")]
    about = next(line.partition(": ")[2] for line in lines if line.startswith("about: "))
    name = path.stem

    def wanted(raw: Raw) -> bool:
        return raw.get("schema") == SCHEMA and (raw.get("suite") or DEFAULT) == name

    def render(raw: Raw, source: str) -> str:
        return summary(ReportRecord.model_validate(raw), source)

    return Section(f"Suite {name}: {about}", wanted, render, commands[0])


def _figures(raw: Raw, source: str) -> str:
    """Return any other result as tables of its figures."""
    shown = {name: value for name, value in raw.items() if name not in ("command", "environment")}
    command = f"`{raw['command']}`. " if "command" in raw else ""
    return "\n".join([*tables(shown), "", f"{command}From [{source}]({source})."])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args(arguments)
    made = text()
    if given.check:
        if not OUTPUT.is_file() or OUTPUT.read_text() != made:
            raise SystemExit(f"{OUTPUT.name} is not what the results say; run: python -m benchmarks.results")
        return
    with new_file(OUTPUT) as draft:
        draft.write_text(made)
    print(OUTPUT.relative_to(ROOT))


if __name__ == "__main__":
    main()
