"""Where a bundle's files go: a folder of its own with copies of the weights, or the pipeline's folder itself."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dipgo.errors import DipgoError, UsageError
from dipgo.files import full_disk, new_folder, sha256_once
from export.bundle import RECORD_FILE, FileRecord
from export.weights import Weights, check_in_place, place

Files = dict[str, FileRecord]


@contextmanager
def deliver(
    folder: Path, weights: Sequence[Weights], root: Path, how: str, force: bool
) -> Iterator[tuple[Path, Files]]:
    """Yield a draft folder for everything but the weights, and the records of the weights files.

    What the body wrote there, and the weights, are in ``folder`` afterwards; on any failure nothing is.

    Raises:
        UsageError: a folder that exists, without ``force``; in place, another one than the pipeline's.
        DipgoError: weights that graphs cannot point to in place, or a full disk.
    """
    if how == "copy":
        with new_folder(folder, force) as draft:
            digests: Files = {}
            for part in weights:
                known = {file: sha256_once(file) for file in part.files}
                for location, digest in place(known, part.root, draft, known).items():
                    digests[location] = FileRecord(bytes=(draft / location).stat().st_size, sha256=digest)
            yield draft, digests
        return
    if folder.resolve() != root.resolve():
        raise UsageError(f"{folder}: with --weights in-place the bundle lies beside the checkpoint; give -o {root}")
    if (folder / RECORD_FILE).exists() and not force:
        raise UsageError(f"{folder / RECORD_FILE} exists; --force replaces the bundle that lies beside the checkpoint")
    found: Files = {}
    for part in weights:
        if part.root.resolve() != root.resolve():
            raise UsageError(
                f"{root}: its checkpoint has another precision than the graphs; give its own --dtype, or --weights copy"
            )
        check_in_place(part.files, root)
        for file in part.files:
            found[file.relative_to(part.root).as_posix()] = FileRecord(
                bytes=file.stat().st_size, sha256=sha256_once(file)
            )
    with full_disk(folder):
        draft = Path(tempfile.mkdtemp(prefix=".bundle-", dir=folder))
    try:
        with full_disk(folder):
            yield draft, found
        _move_in(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _move_in(draft: Path, folder: Path) -> None:
    """Replace the bundle in ``folder`` by what was drafted; its record goes first and comes last."""
    record = folder / RECORD_FILE
    if record.exists():
        try:
            old = json.loads(record.read_text())["files"]
        except (ValueError, KeyError, TypeError) as error:
            raise DipgoError(f"{record}: not a bundle's record; remove it and export again") from error
        record.unlink()
        for name in old:
            if "/" not in name:  # weights and other files of the pipeline lie in folders of their own
                (folder / name).unlink(missing_ok=True)
    for path in sorted(draft.iterdir(), key=lambda path: path.name == RECORD_FILE):
        path.replace(folder / path.name)
