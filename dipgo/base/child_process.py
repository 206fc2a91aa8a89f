"""Child processes that run our own Python: spoken to in lines of JSON, watched, and ended with all that they started.

A child imports our packages from where this process has them, installed or not, and nothing from the working directory.
:class:`ChildProcess` is the parent's side, :class:`Parent` the child's.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import site
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from dipgo.base.errors import DipgoError

GRACE_S = 5.0  # for a child to end by itself once its pipe is closed


class ChildError(DipgoError):
    """A child process ended, or was ended, before it answered; one line that says how, and what it printed last."""


def python_environment() -> dict[str, str]:
    """Return an environment in which Python finds our packages where they are now, and no module where it is run.

    Packages are found where this Python has them installed, or in ``PYTHONPATH``; an entry that is relative to the
    working directory is made absolute.
    """
    root = str(Path(__file__).resolve().parents[2])
    # The folder of installed packages is searched anyway; in PYTHONPATH it would come before the standard library.
    own = [] if root in (*site.getsitepackages(), site.getusersitepackages()) else [root]
    inherited = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return os.environ | {"PYTHONPATH": os.pathsep.join(dict.fromkeys(own + inherited)), "PYTHONSAFEPATH": "1"}


class ChildProcess:
    """A Python process that talks to its :class:`Parent`; a context manager that ends it.

    It has a session of its own, so Ctrl-C in a terminal is for this process to deal with.

    Args:
        module: what it runs, as after ``python -m``.
        log: a file for what it prints.
        arguments: of the module's command line.

    Attributes:
        pid: its process id.
    """

    def __init__(self, module: str, log: Path, arguments: Sequence[str] = ()) -> None:
        self._log, self._received = log, b""
        with log.open("wb") as stream:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                start_new_session=True,
                env=python_environment(),
            )
        assert self._process.stdin and self._process.stdout  # noqa: PT018 - for mypy
        self._to, self._from = self._process.stdin, self._process.stdout
        self.pid = self._process.pid

    def __enter__(self) -> ChildProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def fileno(self) -> int:
        """Return the descriptor to wait at for an answer, together with those of other children."""
        return self._from.fileno()

    def send(self, message: Any) -> None:
        """Send a JSON value.

        Raises:
            ChildError: the process has ended.
        """
        try:
            self._to.write(json.dumps(message).encode() + b"\n")
            self._to.flush()
        except (OSError, ValueError) as error:  # the second where it was closed
            raise self._ended() from error

    def receive(self, patience_s: float | None = None) -> Any:
        """Return the next JSON value that it sends, waiting for at most ``patience_s`` seconds (None: any time).

        Raises:
            ChildError: the process has ended, or took longer and was ended for that.
        """
        limit = None if patience_s is None else time.monotonic() + patience_s
        with selectors.DefaultSelector() as ready:
            ready.register(self._from, selectors.EVENT_READ)
            while b"\n" not in self._received:
                if not ready.select(None if limit is None else max(0.0, limit - time.monotonic())):
                    self.close(0)
                    raise ChildError(f"no answer within {patience_s:g} s, taken for hung and ended")
                part = os.read(self._from.fileno(), 65536)
                if not part:
                    raise self._ended()
                self._received += part
        line, _, self._received = self._received.partition(b"\n")
        return json.loads(line)

    @property
    def returncode(self) -> int | None:
        """How the process ended, as :mod:`subprocess` says it; None while it runs."""
        return self._process.poll()

    def close(self, grace_s: float = GRACE_S) -> None:
        """End the process: by closing its pipe, and after ``grace_s`` by force, with all processes that it started."""
        if self._from.closed:
            return
        with suppress(OSError):  # what was not sent yet
            self._to.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(grace_s)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        self._from.close()

    def _ended(self) -> ChildError:
        self.close()
        code = self._process.returncode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        printed = self._log.read_text(errors="replace").split("\n") if self._log.is_file() else []
        last = next((line.strip() for line in reversed(printed) if line.strip()), "")
        return ChildError(f"its process {how}" + (f"; the last it said: {last[:300]}" if last else ""))


class Parent:
    """The process that started this one: iterate over what it sends, until it closes the pipe or is gone.

    From now on what is printed, by libraries too, goes into the parent's log.
    """

    def __init__(self) -> None:
        self._to = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def __iter__(self) -> Iterator[Any]:
        for line in sys.stdin:
            yield json.loads(line)

    def send(self, message: Any) -> None:
        """Send a JSON value."""
        self._to.write(json.dumps(message) + "\n")
        self._to.flush()
