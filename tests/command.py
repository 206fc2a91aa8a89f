"""The command line in this process."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from collections.abc import Mapping
from typing import NamedTuple
from unittest import mock

from dipgo.cli.main import main


class Done(NamedTuple):
    code: int
    out: str
    err: str


def sets(settings: Mapping[str, object]) -> list[str]:
    """Return settings of a search as options."""
    return [f"--set={name}={value}" for name, value in settings.items()]


def dipgo(*arguments: object) -> Done:
    """Run ``dipgo`` with these arguments: what it prints, and its exit code."""
    out, err, handler = io.StringIO(), io.StringIO(), signal.getsignal(signal.SIGTERM)
    with (
        mock.patch.object(sys, "argv", ["dipgo", *map(str, arguments)]),
        mock.patch.object(sys, "path", [*sys.path]),
        mock.patch.dict(os.environ),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as exited:
            code = int(exited.code or 0)
        finally:
            signal.signal(signal.SIGTERM, handler)
    return Done(code, out.getvalue(), err.getvalue())
