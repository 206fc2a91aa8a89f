"""The execution contexts of a bundle: every trajectory under way has its own, and idle ones wait for the next.

Calls cannot leak into each other, in one thread or several: a context holds all that a trajectory changes, and each
trajectory overwrites it from its first step on.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping, Sequence

import numpy as np

from engines.backend import Runner
from engines.context import ExecutionContext
from engines.sizes import axes_of
from export.bundle import Bundle

IDLE = 8  # that wait for their next trajectory, of all sizes together; each holds memory of its own


class ContextPool:
    """Where a trajectory takes its context from.

    Attributes:
        launches: graphs of the loop that were launched on any of them.
    """

    def __init__(self, bundle: Bundle, runner: Runner) -> None:
        self.bundle, self._runner = bundle, runner
        self._idle: list[ExecutionContext] = []  # the one that ran last at the end
        self._lock = threading.Lock()
        self._matrices: Mapping[str, np.ndarray] | None = None
        self.launches = 0

    def adapted(self, matrices: Mapping[str, np.ndarray]) -> ContextPool:
        """Return the same pool, whose contexts hold these matrices of low-rank branches when they are taken."""
        pool = copy.copy(self)
        pool._matrices = matrices
        return pool

    def take(self, shape: Sequence[int]) -> ExecutionContext:
        """Return an idle context for a batch of latents of this shape, or a new one.

        Raises:
            UsageError: a shape that the bundle was not compiled for.
        """
        sizes = axes_of(self.bundle.record, shape)
        context = self._idle_at(sizes) or ExecutionContext(self.bundle, self._runner, sizes)
        if self._matrices is not None:
            context.adapt(self._matrices)
        return context

    def _idle_at(self, sizes: Mapping[str, int]) -> ExecutionContext | None:
        with self._lock:
            for index in reversed(range(len(self._idle))):
                if self._idle[index].sizes == sizes:
                    return self._idle.pop(index)
        return None

    def give(self, context: ExecutionContext) -> None:
        """Give back a context that nothing uses any more; beyond :data:`IDLE` the one that waited longest goes."""
        with self._lock:
            self._idle.append(context)
            del self._idle[:-IDLE]

    def clear(self) -> None:
        """Let go of those that wait."""
        with self._lock:
            self._idle.clear()
