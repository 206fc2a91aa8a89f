"""The places in the README that benchmarks write."""

from __future__ import annotations

from pathlib import Path

from dipgo.base.errors import DipgoError

README = Path(__file__).parents[2] / "README.md"


def put_between(file: Path, marker: str, text: str) -> None:
    """Put a text between ``<!-- MARKER:begin -->`` and ``<!-- MARKER:end -->`` in a file."""
    begin, end = f"<!-- {marker}:begin -->", f"<!-- {marker}:end -->"
    before, found, rest = file.read_text().partition(begin)
    _, ended, after = rest.partition(end)
    if not found or not ended:
        raise DipgoError(f"{file} has no place '{begin} … {end}'; add it where the table should stand")
    file.write_text(f"{before}{begin}\n{text}\n{end}{after}")
