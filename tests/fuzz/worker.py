"""What must hold of every mutant, tried in a process apart: refused in one line, or run; soon, in little memory."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import resource
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dipgo.base.errors import DipgoError
from dipgo.base.text import LONGEST

SECONDS, BYTES = 10.0, 2**30
_PATIENCE = 60.0  # seconds until a mutant is taken for hung: more than SECONDS, since other processes run too
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_CHANGES = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.link", "os.truncate", "shutil.rmtree"}
_NEVER = {"subprocess.Popen", "os.system", "os.exec", "os.fork", "socket.connect", "pickle.find_class"}

Trial = Callable[[Path, Path], None]
"""Makes a mutant in the first folder and uses it, writing into the second alone."""


@dataclass
class Verdict:
    """``outcome`` is ``ran``, or the line that refused; ``faults`` what must not be."""

    outcome: str = "ran"
    seconds: float = 0.0
    megabytes: float = 0.0
    faults: list[str] = field(default_factory=list)


class Worker:
    """A process that tries mutants one after another, replaced when it hangs or dies; a context manager.

    Args:
        make, use: of the kinds by name: ``make(seed, folder)`` writes a mutant there and returns its path,
            ``use(path, output)`` does with it what users do.
    """

    def __init__(self, kinds: dict[str, Any], scratch: Path) -> None:
        self._kinds, self._scratch = kinds, scratch
        self._log = scratch.with_name("hung")
        self._process: Any = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self._end()

    def judge(self, kind: str, seed: Any) -> Verdict:
        """Make and use a mutant, and return what came of it."""
        if self._process is None:
            self._start()
        self._pipe.send((kind, seed))
        try:
            if self._pipe.poll(_PATIENCE):
                verdict: Verdict = self._pipe.recv()
                return verdict
            self._end()
            where = self._log.read_text()[-3000:] if self._log.exists() else ""
            return Verdict("hung", _PATIENCE, faults=[f"no end within {_PATIENCE:g} s\n{where}"])
        except (EOFError, ConnectionResetError):
            code = self._end()
            return Verdict("died", faults=[f"the process died ({code})"])

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, self._kinds, self._scratch, self._log), daemon=True)
        self._process.start()
        other.close()

    def _end(self) -> Any:
        if self._process is None:
            return None
        self._process.join(0.5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        code, self._process = self._process.exitcode, None
        return code


def _serve(pipe: Any, kinds: dict[str, Any], scratch: Path, log: Path) -> None:
    watch, stacks = _Watch(scratch / "out"), log.open("w")
    sys.addaudithook(watch)
    while True:
        try:
            kind, seed = pipe.recv()
        except EOFError:
            return
        shutil.rmtree(scratch, ignore_errors=True)
        for name in ("in", "out"):
            (scratch / name).mkdir(parents=True)
        faulthandler.dump_traceback_later(_PATIENCE - 2, file=stacks)
        path = kinds[kind].make(seed, scratch / "in")
        pipe.send(_judged(lambda path=path, kind=kind: kinds[kind].use(path, scratch / "out"), _bytes_of(path), watch))


def _judged(use: Callable[[], None], size: int, watch: _Watch) -> Verdict:
    verdict, before = Verdict(), _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    resource.setrlimit(resource.RLIMIT_AS, (_memory("VmSize") + 8 * 2**30 + size, resource.RLIM_INFINITY))
    start = time.process_time()
    watch.seen, watch.on = [], True
    try:
        use()
    except DipgoError as error:
        verdict.outcome = str(error)
        if len(verdict.outcome) > LONGEST or not verdict.outcome.isprintable():
            verdict.faults.append(f"not a line: {verdict.outcome[:100]!r}")
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        verdict.outcome = f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {str(error)[:300]}"
        verdict.faults.append(f"{verdict.outcome}\n{traceback.format_exc()[-3000:]}")
    watch.on = False
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    verdict.seconds = time.process_time() - start
    verdict.megabytes = max(0, _memory("VmHWM") - before) / 2**20
    if verdict.seconds > SECONDS:
        verdict.faults.append(f"took {verdict.seconds:.1f} s")
    if verdict.megabytes * 2**20 > BYTES + size:
        verdict.faults.append(f"took {verdict.megabytes:.0f} MB")
    verdict.faults += watch.seen[:3]
    return verdict


class _Watch:
    """An audit hook that notes writes outside of a folder, processes, connections, and classes of pickles."""

    def __init__(self, output: Path) -> None:
        self._output, self.on = str(output), False
        self.seen: list[str] = []

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in _NEVER:
            self.seen.append(f"{event} {arguments!r:.200}")
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING
        if (writes or event in _CHANGES) and not self._may(str(arguments[0])):
            self.seen.append(f"{event} {arguments!r:.200}")

    def _may(self, path: str) -> bool:
        return path.startswith(self._output) or path == "/dev/null" or path.isdecimal()  # an open file's number


def _memory(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def _bytes_of(path: Path) -> int:
    """Return the bytes on disk of a file, or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.lstat().st_blocks * 512 for file in files if os.path.lexists(file))
