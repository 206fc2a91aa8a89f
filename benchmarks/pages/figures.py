"""Any JSON result as markdown tables: its single figures in one, each collection of like records in one of its own.

Parts that have figures in common stand side by side. Large counts, bytes among them, are rounded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dipgo.base import units

LONGEST = 12  # a list with more entries is given by its length

Records = Mapping[str, Mapping[str, Any]]


def tables(values: Mapping[str, Any]) -> list[str]:
    """Return the lines of the tables."""
    parts = list(_walk(values))
    single = {name: value for name, value in parts if isinstance(value, str)}
    beside = _beside(single)
    alone = [(_words(name), value) for name, value in single.items() if name.partition(".")[0] not in beside]
    lines = _table(["figure", "value"], alone) if alone else []
    if beside:
        figures = dict.fromkeys(figure for part in beside.values() for figure in part)
        rows = [[_words(figure), *(part.get(figure, "") for part in beside.values())] for figure in figures]
        lines += [*[""] * bool(lines), *_table(["figure", *map(_words, beside)], rows)]
    for name, records in parts:
        if not isinstance(records, str):
            lines += [*[""] * bool(lines), f"{_words(name)}:", "", *_of_records(records)]
    return lines


def _beside(single: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Return the parts, of figures by dotted name, that have a figure in common with another."""
    found: dict[str, dict[str, str]] = {}
    for name, value in single.items():
        part, dot, figure = name.partition(".")
        if dot:
            found.setdefault(part, {})[figure] = value
    return {
        part: own
        for part, own in found.items()
        if any(own.keys() & others.keys() for other, others in found.items() if other != part)
    }


def _words(name: str) -> str:
    return name.replace(".", ", ").replace("_", " ")


def _of_records(records: Records) -> list[str]:
    """Return a table with a row a record and a column a figure; keys are shown where they are not numbers."""
    rows = {key: dict(_leaves(record)) for key, record in records.items()}
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    corner = [] if all(key.isdigit() for key in records) else [""]
    cells = [[*[key for _ in corner], *(row.get(column, "") for column in columns)] for key, row in rows.items()]
    return _table([*corner, *map(_words, columns)], cells)


def _walk(value: Any, name: str = "") -> Iterator[tuple[str, str | Records]]:
    """Yield the parts of a JSON value by dotted name: collections of records whole, all else by leaf."""
    if isinstance(value, dict):
        for key, each in value.items():
            path = f"{name}.{key}" if name else key
            records = _records(each)
            if records:
                yield path, records
            else:
                yield from _walk(each, path)
    elif isinstance(value, list) and len(value) > LONGEST:
        yield name, f"{len(value)} entries"
    elif isinstance(value, list):
        yield name, ", ".join(json.dumps(each) if isinstance(each, (dict, list)) else _text(each) for each in value)
    else:
        yield name, _text(value)


def _leaves(value: Mapping[str, Any], name: str = "") -> Iterator[tuple[str, str]]:
    """Yield all leaves of a record by dotted name."""
    for path, part in _walk(value, name):
        if isinstance(part, str):
            yield path, part
        else:
            for key, record in part.items():
                yield from _leaves(record, f"{path}.{key}")


def _records(value: Any) -> Records | None:
    """Return a collection of several records by key; None for anything else."""
    if isinstance(value, list):
        value = {str(index): each for index, each in enumerate(value)}
    if isinstance(value, dict) and len(value) > 1 and all(isinstance(each, dict) for each in value.values()):
        return value
    return None


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows)]


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return units.large(value)
    return "–" if value is None else value if isinstance(value, str) else json.dumps(value)
