"""Interrupting calls as diffusers does it, by an attribute of the pipeline, where several threads call one pipeline."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(eq=False)
class Call:
    """A call under way."""

    interrupted: bool = False


class Calls:
    """The calls of one pipeline that are under way.

    A thread that is in a call, a callback's, interrupts that call alone; any other thread all of them. A call begins
    uninterrupted.
    """

    def __init__(self) -> None:
        self._all: set[Call] = set()
        self._lock = threading.Lock()
        self._local = threading.local()

    @contextmanager
    def one(self) -> Iterator[Call]:
        """Begin a call, and end it with the context."""
        call, outer = Call(), self._own
        with self._lock:
            self._all.add(call)
        self._local.call = call
        try:
            yield call
        finally:
            self._local.call = outer
            with self._lock:
                self._all.discard(call)

    @property
    def interrupted(self) -> bool:
        """Whether this thread's call is interrupted, or, from outside, any."""
        with self._lock:
            return any(call.interrupted for call in ([self._own] if self._own else self._all))

    def interrupt(self, value: bool) -> None:
        with self._lock:
            for call in [self._own] if self._own else self._all:
                call.interrupted = value

    @property
    def _own(self) -> Call | None:
        return getattr(self._local, "call", None)
