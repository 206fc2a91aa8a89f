"""Where a bundle's files go: a folder of its own with copies of the weights, or the pipeline's folder itself."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dipgo.base.errors import DipgoError, UsageError
from dipgo.base.files import (
    draft_folder,
    full_disk,
    new_file,
    new_folder,
    refuse_existing,
    refuse_unwritable,
    sha256_of,
    sha256_once,
)
from dipgo.base.records import read_json
from export.bundle import BUNDLE, RECORD_FILE
from export.onnx.weights import Weights, check_in_place, place
from export.records.bundle import FileRecord

Files = dict[str, FileRecord]
MODEL_FILE = "model_index.json"
UNFINISHED = "dipgo.bundle/unfinished"


def check_delivery(folder: Path, root: Path, how: str, force: bool, names: Iterable[str] = ()) -> None:
    """Refuse a folder that cannot take a bundle of the pipeline in ``root``; ``names`` are files that it will hold.

    Raises:
        UsageError: a folder that exists, without ``force``. With copies, one that holds the pipeline, one that is
            another pipeline's own, or no bundle; in place, another one than the pipeline's, or one where a file of the
            user's has such a name.
        DipgoError: in place, the record of a bundle that cannot be read.
    """
    if how == "copy":
        if root.resolve().is_relative_to(folder.resolve()):
            raise UsageError(
                f"{folder}: holds the model ({root}), which a bundle in its place would delete; give another -o, or "
                f"--weights in-place with -o {root}"
            )
        if (folder / MODEL_FILE).exists():  # with another model's bundle in place
            raise UsageError(
                f"{folder}: is a pipeline's own folder ({MODEL_FILE}), which a bundle in its place would delete; give "
                "another -o"
            )
        refuse_existing(folder, force, BUNDLE)
        return
    refuse_unwritable(folder, folder)
    if folder.resolve() != root.resolve():
        raise UsageError(f"{folder}: with --weights in-place the bundle lies beside the checkpoint; give -o {root}")
    if (folder / RECORD_FILE).exists() and not force:
        raise UsageError(f"{folder / RECORD_FILE} exists; --force replaces the bundle that lies beside the checkpoint")
    _check_free(folder, names, _owned(folder))


def check_weights(part: Weights | None, root: Path) -> None:
    """Refuse weights that graphs in the pipeline's folder cannot point to; None stands for cast or drawn ones.

    Raises:
        UsageError: weights that lie elsewhere.
        DipgoError: a file that ONNX tools would refuse.
    """
    if part is None or part.root.resolve() != root.resolve():
        raise UsageError(
            f"{root}: its checkpoint has another precision than the graphs, or no weights; give its own --dtype, or "
            "--weights copy"
        )
    check_in_place(part.files, root)


@contextmanager
def deliver(
    folder: Path, weights: Sequence[Weights], root: Path, how: str, force: bool
) -> Iterator[tuple[Path, Files]]:
    """Yield a draft folder for everything but the weights, and the records of the weights files.

    What the body wrote there, and the weights, are in ``folder`` afterwards; on any failure of the body nothing is.

    Raises:
        UsageError, DipgoError: see :func:`check_delivery` and :func:`check_weights`; a full disk.
    """
    check_delivery(folder, root, how, force)
    records: Files = {}
    if how == "copy":
        with new_folder(folder, force, BUNDLE) as draft:
            for part in weights:
                known = {file: sha256_once(file) for file in part.files}
                for location, digest in place(known, part.root, draft, known).items():
                    records[location] = FileRecord(bytes=(draft / location).stat().st_size, sha256=digest)
            yield draft, records
        return
    for part in weights:
        check_weights(part, root)
        for file in part.files:
            records[file.relative_to(part.root).as_posix()] = FileRecord(
                bytes=file.stat().st_size, sha256=sha256_once(file)
            )
    with full_disk(folder):
        draft = draft_folder(folder, "bundle")
    try:
        with full_disk(folder):
            yield draft, records
        _move_in(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _move_in(draft: Path, folder: Path) -> None:
    """Replace the bundle in ``folder`` by what was drafted.

    Meanwhile a list of the old names and the new ones stands in for the record, so that what a kill leaves behind
    belongs to an unfinished bundle, which the next export replaces.
    """
    owned, new = _owned(folder), {path.name for path in draft.iterdir()} - {RECORD_FILE}
    _check_free(folder, new, owned)
    with new_file(folder / RECORD_FILE) as unfinished:
        unfinished.write_text(json.dumps({"schema": UNFINISHED, "files": dict.fromkeys(sorted(owned | new))}))
    for name in new:
        (draft / name).replace(folder / name)
    for name in owned - new:
        (folder / name).unlink()
    (draft / RECORD_FILE).replace(folder / RECORD_FILE)


def _owned(folder: Path) -> set[str]:
    """Return the files beside the checkpoint that the bundle there has brought and nobody has changed, but its record.

    Raises:
        DipgoError: a record that cannot be read.
    """
    record = folder / RECORD_FILE
    if not record.exists():
        return set()
    try:
        content = read_json(record, "bundle's record")
        # Weights and other files of the pipeline lie in folders of their own.
        files = {name: entry for name, entry in content["files"].items() if "/" not in name and name != MODEL_FILE}
        digests = {name: content["schema"] != UNFINISHED and entry["sha256"] for name, entry in files.items()}
    except (DipgoError, AttributeError, KeyError, TypeError) as error:
        raise DipgoError(f"{record}: not a bundle's record; remove it and export again") from error
    there = {name: digest for name, digest in digests.items() if (folder / name).is_file()}
    return {name for name, digest in there.items() if not digest or sha256_of(folder / name) == digest}


def _check_free(folder: Path, names: Iterable[str], owned: set[str]) -> None:
    """Refuse names that files in ``folder`` have which no bundle brought."""
    taken = sorted(name for name in names if name not in owned and os.path.lexists(folder / name))
    if taken:
        raise UsageError(
            f"{folder / taken[0]} belongs to no bundle, or was changed since, and the new one has a file of that name; "
            "move it away, or export with --weights copy"
        )
