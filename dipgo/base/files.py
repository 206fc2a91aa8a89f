"""Files written whole or not at all, fingerprints of files, and the folder of what is kept between runs."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dipgo.base.errors import DipgoError, UsageError

if TYPE_CHECKING:
    from filelock import BaseFileLock

_DRAFT = re.compile(r"\.(.+)\.dipgo-[a-z0-9_]{8}(\.\w+)?(-replaced)?")  # as tempfile names drafts
_DAY = 24 * 3600  # seconds after which nobody works on a draft any more


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


def cache_root() -> Path:
    """Return the folder of what dipgo keeps between runs, ``$XDG_CACHE_HOME/dipgo``; all of it can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dipgo"


def refuse_unwritable(folder: Path, output: Path) -> None:
    """Refuse an output that is to be in ``folder``, which takes no files, or cannot be made, before any work is done.

    Raises:
        UsageError: the nearest folder that exists cannot be written to.
    """
    folder = folder.absolute()
    nearest = next((path for path in (folder, *folder.parents) if os.path.lexists(path)), folder)
    if not (nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)):
        raise UsageError(f"{output}: {nearest} is no folder that can be written to; give another path")


@dataclass(frozen=True)
class Kind:
    """A kind of folder that we write, for telling what in one of them is ours.

    Attributes:
        known_by: a file that each of them holds.
        files: from a folder of this kind to the other files that belong to it, as paths below it.
    """

    known_by: str
    files: Callable[[Path], Iterable[str]] = lambda folder: ()

    def stranger(self, folder: Path) -> str | None:
        """Return a file or link in a folder of this kind that does not belong to it; None where all is ours."""
        own = {self.known_by, *self.files(folder)}
        return next((file for file in files_below(folder) if file not in own), None)


def files_below(folder: Path) -> Iterator[str]:
    """Yield the files and links in a folder and the folders in it, as paths below it; links are not followed."""
    for place, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        for name in (*files, *links):
            yield Path(place, name).relative_to(folder).as_posix()


def refuse_existing(path: Path, force: bool, kind: Kind | None = None) -> None:
    """Refuse an output that exists already, or that cannot be written, before any work is done for it.

    ``kind`` is for folders. With ``force`` too what is not wholly of this kind is refused, since it is somebody else's;
    but an empty folder is not, nor a link, of which no more than itself is lost.
    """
    refuse_unwritable(path.absolute().parent, path)
    _refuse_there(path, force)
    if kind is None or path.is_symlink() or not path.exists():
        return
    try:
        known = (path / kind.known_by).is_file()
        stranger = kind.stranger(path) if known else None
        empty = path.is_dir() and not any(path.iterdir())
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); give another path") from error
    if not known and not empty:
        raise UsageError(f"{path}: holds no {kind.known_by}, so --force does not replace it; give another path")
    if stranger:
        raise UsageError(
            f"{path}: holds {stranger}, which --force would delete and is not part of what it replaces; move it away, "
            "or give another path"
        )
    if os.path.ismount(path):
        raise UsageError(f"{path}: is where a file system is mounted, which nothing replaces; give a folder in it")


def refuse_unless_new(path: Path) -> None:
    """Refuse an output that exists already where nothing is ever replaced, or that cannot be written."""
    refuse_unwritable(path.absolute().parent, path)
    if os.path.lexists(path):
        raise UsageError(f"{path} exists; give another path")


def refuse_to_fill(folder: Path, force: bool) -> None:
    """The same of a folder that outputs are written into, whatever else is in it."""
    refuse_unwritable(folder, folder)
    _refuse_there(folder, force)


def _refuse_there(path: Path, force: bool) -> None:
    if os.path.lexists(path) and not force:  # a link that leads nowhere is there too
        raise UsageError(f"{path} exists; give another path, or --force to replace it")


@contextmanager
def new_file(path: Path, force: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it is renamed, on any failure removed."""
    refuse_existing(path, force)
    with _written(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_drafts(path.parent, _DAY)
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}.dipgo-", suffix=path.suffix, dir=path.parent)
        os.close(handle)
    draft = Path(name)
    try:
        with full_disk(path):
            yield draft
        with _written(path):
            draft.chmod(0o644)
            draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path, force: bool = False, kind: Kind | None = None) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; on success it takes the place of ``path``, on any failure it goes.

    With ``force`` it replaces what :func:`refuse_existing` lets it; of a link, the link itself.
    """
    if path.name in ("", ".."):  # "." would be its own parent
        path = path.resolve()
    refuse_existing(path, force, kind)
    with _written(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = draft_folder(path.parent, path.name)
    try:
        with full_disk(path):
            yield draft
        refuse_existing(path, force, kind)  # again: the work may have taken minutes
        with _written(path):
            draft.chmod(0o755)
            _put(draft, path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _put(draft: Path, path: Path) -> None:
    """Rename a folder over what is there, which goes last: whatever fails or is killed, one of the two is whole."""
    if not os.path.lexists(path):
        draft.rename(path)
        return
    aside = draft.with_name(f"{draft.name}-replaced")
    path.rename(aside)
    try:
        draft.rename(path)
    except OSError:
        aside.rename(path)
        raise
    if aside.is_dir() and not aside.is_symlink():
        shutil.rmtree(aside, ignore_errors=True)
    else:
        aside.unlink()


def draft_folder(parent: Path, name: str) -> Path:
    """Return a new, hidden folder in ``parent`` for what is to be ``name``; drafts of past days go."""
    remove_drafts(parent, _DAY)
    return Path(tempfile.mkdtemp(prefix=f".{name}.dipgo-", dir=parent))


def remove_drafts(folder: Path, age: float = 0) -> None:
    """Remove from a folder what kills have left half written there, ``age`` seconds ago or earlier.

    What was moved aside goes only where what was to replace it is in its place.
    """
    for path in folder.iterdir():
        draft = _DRAFT.fullmatch(path.name)
        if draft is None or path.is_symlink() or (draft[3] and not os.path.lexists(folder / draft[1])):
            continue
        with suppress(OSError):  # another process may have done it
            if time.time() - path.stat().st_mtime >= age:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def lock_file(path: Path, cure: str) -> BaseFileLock:
    """Keep other processes from doing the same as long as what this returns is there; this one may do it again.

    Where a file system knows no locks, nothing is locked.

    Raises:
        DipgoError: another process holds it, and here is the cure; or the file cannot be written.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path, timeout=0, thread_local=False, is_singleton=True)
    with _written(path), suppress(NotImplementedError):
        try:
            lock.acquire()
        except Timeout as error:
            raise DipgoError(f"{path.parent}: another process works in it; {cure}") from error
    return lock


@contextmanager
def _written(path: Path) -> Iterator[None]:
    """Turn whatever keeps an output from being written into one line."""
    try:
        with full_disk(path):
            yield
    except OSError as error:
        raise DipgoError(f"{path}: cannot be written ({error.strerror}); give another path") from error


@contextmanager
def full_disk(path: Path) -> Iterator[None]:
    """Turn the errors of a full disk, a quota or a limit on file sizes into one line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DipgoError(f"{path}: the disk is full; nothing was written, free some space and run again") from error
        raise
