"""Files written whole or not at all, and fingerprints of files."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from dipgo.errors import DipgoError, UsageError


def sha256_of(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_once(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a large file, reading it once a process as long as it is not changed."""
    status = path.stat()
    return _sha256_of_version(path.absolute(), status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@lru_cache(maxsize=256)
def _sha256_of_version(path: Path, *_version: int) -> str:
    return sha256_of(path)


def sha256_of_json(value: Any) -> str:
    """Return the SHA-256 of a JSON value in canonical form (sorted keys, no spaces)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def refuse_existing(path: Path, force: bool) -> None:
    """Refuse an output that exists already, before any work is done for it."""
    if path.exists() and not force:
        raise UsageError(f"{path} exists; give another path, or --force to replace it")


@contextmanager
def new_file(path: Path, force: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it is renamed, on any failure removed."""
    refuse_existing(path, force)
    with full_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
        os.close(handle)
    draft = Path(name)
    try:
        with full_disk(path):
            yield draft
        draft.chmod(0o644)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path, force: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; on success it takes the place of ``path``, on any failure it goes."""
    refuse_existing(path, force)
    with full_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        with full_disk(path):
            yield draft
        draft.chmod(0o755)
        if path.exists():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        draft.rename(path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def full_disk(path: Path) -> Iterator[None]:
    """Turn the errors of a full disk, a quota or a limit on file sizes into one line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DipgoError(f"{path}: the disk is full; nothing was written, free some space and run again") from error
        raise
