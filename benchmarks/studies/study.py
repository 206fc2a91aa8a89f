"""What all studies are made of: a command line, where it was measured, a record in JSON.

A study is a module with a question in its docstring, records and a measurement; its ``main`` is told the words of its
command line, and begins with a :class:`Study`.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import Environment, environment, load_average
from dipgo.base.child_process import python_environment
from dipgo.base.errors import DipgoError
from dipgo.base.files import new_file, refuse_existing
from dipgo.base.records import Record

Words = Sequence[str]


class StudyRecord(Record):
    """A result file: the command that wrote it, where that ran, and what a study adds."""

    command: str
    environment: Environment


class Study:
    """One run of a study's command.

    Args:
        name: of its module, ``benchmarks.studies.NAME``.
        about: the module's docstring.
        words: of the command line; None takes this process's.
        required: whether ``-o`` must be given.

    Attributes:
        parser: to which the study adds its arguments; ``-o`` for the record is there.
    """

    def __init__(self, name: str, about: str | None, words: Words | None = None, required: bool = True) -> None:
        self.module = f"benchmarks.studies.{name}"
        self.parser = ArgumentParser(
            prog=f"python -m {self.module}", description=about, formatter_class=RawDescriptionHelpFormatter
        )
        self.parser.add_argument("-o", "--output", type=Path, required=required, help="where the record goes, as JSON")
        self._words = list(sys.argv[1:] if words is None else words)
        self._load = load_average()

    def options(self) -> Namespace:
        """Parse the command line, and refuse an output that cannot be written before anything is measured."""
        options = self.parser.parse_args(self._words)
        self._output: Path | None = options.output
        if self._output:
            refuse_existing(self._output, force=True)
        return options

    def origin(self) -> dict[str, Any]:
        """Return what a :class:`StudyRecord` says of its making, now that all is measured."""
        return origin(self.module, self._words, self._load)

    def alone(self, *words: object) -> dict[str, Any]:
        """Run this module with these words in a process of its own; returns what its last line of JSON holds.

        Raises:
            DipgoError: it failed; with the last line that it said.
        """
        command = [sys.executable, "-m", self.module, *map(str, words)]
        process = subprocess.run(command, capture_output=True, text=True, check=False, env=python_environment())
        if process.returncode:
            raise DipgoError((process.stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1])
        return dict(json.loads(process.stdout.splitlines()[-1]))

    def write(self, record: Record) -> None:
        """Write the record."""
        if self._output:
            with new_file(self._output) as draft:
                draft.write_text(record.text())


def origin(module: str, words: Words, load_at_start: list[float]) -> dict[str, Any]:
    """Return the command and the environment of a :class:`StudyRecord`."""
    command = shlex.join(["python", "-m", module, *words])
    return {"command": command, "environment": environment(load_at_start)}


def run(main: Callable[[], object]) -> None:
    """Run a study's ``main`` as a command: an error that a user can mend is one line, of the first process alone."""
    try:
        main()
    except DipgoError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"{Path(sys.argv[0]).stem}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
