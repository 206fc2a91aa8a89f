"""The parent's side of workers: start them, ask them, and notice when one dies or hangs."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.bench.failures import NotMeasuredError
from benchmarks.bench.specs import ProgramSpec, TorchSpec
from dipgo.base.child_process import python_environment

GRACE = 5.0  # seconds for a worker to end by itself once its pipe is closed


class Worker:
    """A process with one program loaded; a context manager that ends it.

    Args:
        spec: what to load.
        log: a file for what the process prints.
        patience: seconds that an answer may take.

    Attributes:
        pid: of the process.
    """

    def __init__(self, spec: ProgramSpec | TorchSpec, log: Path, patience: float) -> None:
        self.spec, self.log, self.patience = spec, log, patience
        with log.open("wb") as stream:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.bench.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                start_new_session=True,  # Ctrl-C is the parent's to deal with
                env=python_environment(),
            )
        self.pid = self._process.pid
        self._held = b""

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def load(self) -> dict[str, Any]:
        """Load the program; see :meth:`benchmarks.bench.worker.Server.do_load`."""
        return self.ask("load", spec=self.spec.model_dump())

    def ask(self, what: str, **given: Any) -> dict[str, Any]:
        """Ask and wait for the answer.

        Raises:
            NotMeasuredError: the worker failed, died, or took longer than it may; the two last end it.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": what, **given}).encode() + b"\n")
            self._process.stdin.flush()
            answer = json.loads(self._line())
        except (OSError, EOFError, json.JSONDecodeError) as error:
            raise NotMeasuredError(self._death()) from error
        if "error" in answer:
            raise NotMeasuredError(answer["error"])
        found: dict[str, Any] = answer
        return found

    @property
    def ended(self) -> bool:
        """Whether the process is no more."""
        return self._process.poll() is not None

    def close(self) -> None:
        """End the process: by closing its pipe, and if that does not help by force."""
        if self._process.stdin and not self._process.stdin.closed:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        try:
            self._process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()

    def _line(self) -> bytes:
        """Return the next line of answers, without its end."""
        assert self._process.stdout is not None
        limit = time.monotonic() + self.patience
        with selectors.DefaultSelector() as ready:
            ready.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._held:
                if not ready.select(max(0.0, limit - time.monotonic())):
                    self._process.kill()
                    self.close()
                    raise NotMeasuredError(f"no answer within {self.patience:g} s, taken for hung and ended")
                part = os.read(self._process.stdout.fileno(), 65536)
                if not part:
                    raise EOFError
                self._held += part
        line, _, self._held = self._held.partition(b"\n")
        return line

    def _death(self) -> str:
        """Say how the process ended, with the last line that it printed."""
        self.close()
        code = self._process.returncode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        printed = self.log.read_text(errors="replace").split("\n") if self.log.is_file() else []
        last = next((line.strip() for line in reversed(printed) if line.strip()), "")
        return f"its process {how}" + (f": {last[:120]}" if last else "")
