"""What a command is given as file or folder: found one folder further down, and named where it is something else."""

from __future__ import annotations

import json
from pathlib import Path

from dipgo.base.errors import DipgoError, UsageError
from dipgo.base.inputs import LARGEST

BUNDLE, SUBNET, MODEL, REPORT = "a bundle", "a SubNet", "a diffusers pipeline", "a report"
FOLDERS = {"bundle.json": BUNDLE, "model_index.json": MODEL, "report.json": REPORT, "run.json": "a search's run folder"}
"""By the file that tells a folder's kind."""
SCHEMAS = {"subnet": SUBNET, "bundle": "a bundle's record", "report": REPORT, "run": "the record of a search's run"}
"""By the word between ``dipgo.`` and ``/1`` in a JSON file."""
CURES = {
    (SUBNET, BUNDLE): "make a bundle of it: dipgo export {path} -o bundle",
    (MODEL, BUNDLE): "make a bundle of it: dipgo compile {path} --steps 50 --budget 0.35 -o DIR",
    ("a bundle's record", BUNDLE): "give the folder that it lies in",
    (BUNDLE, SUBNET): "its SubNet is {path}/subnet.json",
    (MODEL, SUBNET): "search one: dipgo search {path} --steps 50 --budget 0.35 -o subnet.json",
    (BUNDLE, MODEL): "its images: dipgo run {path}",
    (SUBNET, MODEL): "compile it: dipgo export {path} -o bundle",
}


def bundle_at(path: Path) -> Path:
    """Return the bundle at a path or in one folder below it, as ``compile`` and ``demo`` leave it.

    What is not there is left to the reader of bundles.

    Raises:
        UsageError: several bundles below it.
        DipgoError: something else, which is named.
    """
    if kinds_of(path) & {BUNDLE}:
        return path
    below = [found.parent for found in sorted(path.glob("*/bundle.json"))] if path.is_dir() else []
    if len(below) > 1:
        raise UsageError(f"{path}: holds several bundles ({', '.join(each.name for each in below)}); give one of them")
    if not below:
        refuse_other(path, BUNDLE)
    return below[0] if below else path


def subnet_at(path: Path) -> Path:
    """Return the SubNet's file at a path, or ``subnet.json`` in the folder that ``compile`` made; see above."""
    inside = path / "subnet.json"
    if inside.is_file() and not kinds_of(path):
        return inside
    refuse_other(path, SUBNET)
    return path


def either_at(path: Path) -> Path:
    """Return the bundle or the SubNet's file at a path; see above."""
    return path if path.is_file() and SUBNET in kinds_of(path) else bundle_at(path)


def model_at(name: str) -> str:
    """Return the name of a model, unless it is the path of something else; see above."""
    refuse_other(Path(name), MODEL)
    return name


def refuse_other(path: Path, wanted: str) -> None:
    """Refuse a path at which something else of ours lies; DipgoError says what, and what to do."""
    kinds = kinds_of(path)
    if kinds and wanted not in kinds:
        kind = min(kinds)
        cure = CURES.get((kind, wanted), f"give {wanted}").format(path=path)
        raise DipgoError(f"{path}: {kind}, not {wanted}; {cure}")


def kinds_of(path: Path) -> set[str]:
    """Return what of ours lies at a path: of a folder by the files in it, of a JSON file by its schema."""
    try:
        if path.is_dir():
            return {kind for file, kind in FOLDERS.items() if (path / file).is_file()}
        if path.suffix != ".json" or not path.is_file() or path.stat().st_size > LARGEST:
            return set()
        content = json.loads(path.read_text())
        schema = str(content.get("schema")) if isinstance(content, dict) else ""
    except (OSError, ValueError, RecursionError):  # its reader has a line for it
        return set()
    kind = SCHEMAS.get(schema.removeprefix("dipgo.").partition("/")[0])
    return {kind} if kind else set()
