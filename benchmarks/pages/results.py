"""All pages that hold measured tables, made from the committed ``results/*.json``. No figure in them is typed.

python -m benchmarks.results            write them
python -m benchmarks.results --check    fail where one is not what would be written

A table goes where a page of ``docs/results/`` has the markers of its file's name, ``<!-- NAME:begin -->`` and
``<!-- NAME:end -->``. ``RESULTS.md`` is the index, and holds what no page has a place for.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks.bench.report import SCHEMA
from benchmarks.bench.suite import DEFAULT, FOLDER
from benchmarks.pages import places
from benchmarks.pages.digest import digest
from benchmarks.pages.render import markdown, origin
from dipgo.base.errors import DipgoError
from dipgo.base.files import new_file
from dipgo.base.records import read_json

ROOT = Path(__file__).parents[2]
DIGEST = "digest"  # README's place for its table


def written(root: Path = ROOT) -> dict[Path, str]:
    """Return the text of every page that holds results: README, ``docs/results/*.md`` and ``benchmarks/RESULTS.md``.

    Raises:
        DipgoError: a result that cannot be read, or a page's place that no result has the name of.
    """
    results = {path.stem: path for path in sorted((root / "benchmarks" / "results").glob("*.json"))}
    pages = [path for path in (root / "README.md", *sorted((root / "docs" / "results").glob("*.md"))) if path.is_file()]
    texts, homes = {}, {}
    for page in pages:
        text = page.read_text()
        homes.update(dict.fromkeys(places.names(text), page))
        texts[page] = places.fill(text, partial(_table, page=page, results=results))
    index = root / "benchmarks" / "RESULTS.md"
    return {**texts, index: _index(index, results, homes)}


def _table(name: str, page: Path, results: dict[str, Path]) -> str:
    """Return what stands in a page's place of that name."""
    if name == DIGEST:
        return digest(page.parent / "benchmarks" / "results", "benchmarks/results")
    if name not in results:
        raise DipgoError(f"{page}: no result is called '{name}'; name the place after a file of benchmarks/results")
    return markdown(results[name], _link(results[name], page))


def _index(index: Path, results: dict[str, Path], homes: dict[str, Path]) -> str:
    """Return RESULTS.md: each page's question, with its records; what is not measured; results that no page shows."""
    origins = {name: origin(read_json(path, "result")) for name, path in results.items()}
    lines = ["# Results", "", "Written by `python -m benchmarks.results` from the files in `results/`.", ""]
    lines += ["| question | records | measured at |", "|---|---|---|"]
    shown = {name: page for name, page in homes.items() if name in results}
    for page in sorted(set(shown.values())):
        title = page.read_text().partition("\n")[0].removeprefix("# ")
        own = [name for name, home in shown.items() if home == page]
        records = ", ".join(f"[{name}]({_link(results[name], index)})" for name in own)
        measured = "<br>".join(dict.fromkeys(origins[name] for name in own))
        lines.append(f"| [{title}]({_link(page, index)}) | {records} | {measured} |")
    lost = sorted(results.keys() - homes.keys())
    lines += [f"| [{name}](#{name}) | [{name}]({_link(results[name], index)}) | {origins[name]} |" for name in lost]
    missing = _not_measured(results)
    if missing:
        lines += ["", "## Not measured yet", "", "| suite | command |", "|---|---|", *missing]
    for name in lost:
        lines += ["", f"## {name}", "", markdown(results[name], _link(results[name], index))]
    return "\n".join(lines) + "\n"


def _not_measured(results: dict[str, Path]) -> list[str]:
    """Return a row for every suite without a report; reports of no suite count as the default one's."""
    raws = [read_json(path, "result") for path in results.values()]
    measured = {raw.get("suite") or DEFAULT for raw in raws if raw.get("schema") == SCHEMA}
    rows = []
    for path in sorted(FOLDER.glob("*.yaml")):
        lines = path.read_text().splitlines()
        about = next(line.removeprefix("about: ") for line in lines if line.startswith("about: "))
        command = next(line.removeprefix("# ") for line in lines if line.startswith("# dipgo bench"))
        if path.stem not in measured:
            rows.append(f"| {path.stem}: {about} | `{command}` |")
    return rows


def _link(path: Path, page: Path) -> str:
    return Path(os.path.relpath(path, page.parent)).as_posix()


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args(arguments).check
    for page, text in written(root).items():
        if page.is_file() and page.read_text() == text:
            continue
        name = page.relative_to(root)
        if check:
            raise SystemExit(f"{name} is not what the results say; run: python -m benchmarks.results")
        with new_file(page) as draft:
            draft.write_text(text)
        print(name)


if __name__ == "__main__":
    main()
