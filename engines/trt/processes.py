"""Work in child processes, so many at a time: what one takes is given back, and one that dies takes nobody with it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

from dipgo.base.errors import DipgoError

T = TypeVar("T")
R = TypeVar("R")


def each(function: Callable[[T], R], tasks: Sequence[T], workers: int, name: Callable[[T], str]) -> Iterator[R]:
    """Yield ``function(task)`` for each task, in the order in which they end.

    When a task fails, or the caller stops, the processes that are still at work are ended.

    Args:
        function: what to do, in a process of its own; of a module's top level, as it is found there by its name.
        tasks: what to do it for; picklable, as are the results.
        workers: how many processes at a time.
        name: what to call a task in messages.

    Raises:
        DipgoError: as the function raised it; or a process died, with what it said last.
    """
    waiting = list(tasks)
    with tempfile.TemporaryDirectory() as folder:
        crew = [_Worker(function, Path(folder) / str(number)) for number in range(min(workers, len(waiting)))]
        try:
            busy: dict[Any, tuple[_Worker, T]] = {}
            for worker in crew:
                busy[worker.connection] = (worker, worker.give(waiting.pop(0), name))
            while busy:
                for connection in wait(list(busy)):
                    worker, task = busy.pop(connection)
                    result = worker.take(name(task))
                    if waiting:
                        busy[connection] = (worker, worker.give(waiting.pop(0), name))
                    yield result
        finally:
            for worker in crew:
                worker.end()


class _Worker:
    def __init__(self, function: Callable[[T], R], output: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._output = output
        self._process = context.Process(target=_work, args=(function, theirs, output), daemon=True)
        self._process.start()
        theirs.close()

    def give(self, task: T, name: Callable[[T], str]) -> T:
        try:
            self.connection.send(task)
        except ConnectionError:
            raise self._death(name(task)) from None
        return task

    def take(self, name: str) -> Any:
        try:
            failed, value = self.connection.recv()
        except (EOFError, ConnectionError):  # the second where it did not read its task
            raise self._death(name) from None
        if failed:
            raise DipgoError(value)
        return value

    def end(self) -> None:
        self._process.terminate()
        self._process.join()
        self.connection.close()

    def _death(self, name: str) -> DipgoError:
        self._process.join()
        return DipgoError(f"{name}: {self._last_words()}")

    def _last_words(self) -> str:
        code = self._process.exitcode or 0
        if code == -signal.SIGKILL:
            return "the process at it was killed, most likely for want of memory; free some, or use fewer --workers"
        lines = self._output.read_text(errors="replace").split("\n") if self._output.exists() else []
        said = next((line.strip() for line in reversed(lines) if line.strip()), "nothing")[:300]
        ending = f"signal {-code}" if code < 0 else f"exit code {code}"
        return f"the process at it ended with {ending}; the last it said: {said}"


def _work(function: Callable[[Any], Any], connection: Connection, output: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its children
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with output.open("w") as stream:  # libraries print what we say in one line
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    while True:
        try:
            task = connection.recv()
        except EOFError:  # the parent is gone
            return
        try:
            answer: tuple[bool, Any] = (False, function(task))
        except DipgoError as error:
            answer = (True, str(error))
        connection.send(answer)
