"""Work in child processes, so many at a time: the memory that one takes goes with it, its death harms no other."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, TypeVar

from dipgo.base.child_process import ChildError, ChildProcess, Parent
from dipgo.base.errors import DipgoError

T = TypeVar("T")

_KILLED = "the process at it was killed, most likely for want of memory; free some, or use fewer --workers"


def each(module: str, tasks: Sequence[tuple[str, Any]], workers: int) -> Iterator[Any]:
    """Yield what a module answers to each task, in the order in which answers come.

    When a task fails, or the caller stops, the processes that are still at work are ended.

    Args:
        module: what to run in each process; it calls :func:`answer_tasks`.
        tasks: what to call a task in messages, and the task, a JSON value.
        workers: how many processes at a time.

    Raises:
        DipgoError: as the module raised it; or a process died, with what it said last.
    """
    queue = list(reversed(tasks))
    busy: dict[ChildProcess, str] = {}
    crew: list[ChildProcess] = []

    def begin(child: ChildProcess) -> None:
        name, task = queue.pop()
        with _death_said(child, name):
            child.send(task)
        busy[child] = name

    with tempfile.TemporaryDirectory() as folder:
        try:
            for number in range(min(workers, len(tasks))):
                crew.append(ChildProcess(module, Path(folder) / str(number)))
                begin(crew[-1])
            while busy:
                waiting: list[Any] = list(busy)
                for child in wait(waiting):
                    assert isinstance(child, ChildProcess)
                    name = busy.pop(child)
                    with _death_said(child, name):
                        answer = child.receive()
                    if "error" in answer:
                        raise DipgoError(answer["error"])
                    if queue:
                        begin(child)
                    yield answer["value"]
        finally:
            for worker in crew:
                worker.close(0)


def answer_tasks(function: Callable[[Any], Any]) -> None:
    """In a child process: answer its tasks by a function of JSON values, until the parent has no more, or is gone."""
    parent = Parent()
    for task in parent:
        try:
            parent.send({"value": function(task)})
        except DipgoError as error:
            parent.send({"error": str(error)})


@contextmanager
def _death_said(child: ChildProcess, name: str) -> Iterator[None]:
    try:
        yield
    except ChildError as error:
        raise DipgoError(f"{name}: {_KILLED if child.returncode == -signal.SIGKILL else error}") from error
