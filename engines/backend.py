"""What a backend does for a program: memory on its device, and launches of graphs bound to that memory.

To add a backend: a package with a runner that does what :class:`Runner` says, and a line in ``engines.backends``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, Self

import numpy as np

Launch = Callable[[], None]


class Buffer(Protocol):
    """Contiguous memory on the backend's device: a numpy array, a torch tensor, or a view on device memory."""

    @property
    def shape(self) -> Any: ...

    @property
    def dtype(self) -> Any: ...

    def __getitem__(self, index: int, /) -> Any:
        """Return a view of one row."""

    def reshape(self, *shape: int) -> Any:
        """Return a view in another shape."""


class Runner(Protocol):
    """A bundle's graphs on one device; engines are loaded on entering the context and dropped on leaving it.

    Launches of one context run in the order in which they are called; :meth:`read` waits for them. Several threads may
    use one runner, each with buffers of its own.

    Attributes:
        label: what runs the graphs, for reports: backend, device, threads.
    """

    label: str

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...

    def zeros(self, shape: Sequence[int], dtype: str) -> Buffer:
        """Return new memory, all zeros; ``dtype`` is numpy's name, or ``bfloat16``."""

    def write(self, target: Buffer, values: np.ndarray) -> None:
        """Copy values from the host, in the target's shape; they may be changed as soon as this returns."""

    def copy(self, target: Buffer, source: Buffer) -> None:
        """Copy a buffer into one of the same shape and dtype."""

    def read(self, source: Buffer) -> np.ndarray:
        """Return a buffer's values on the host; where the backend is on the host it may be a view."""

    def bind(self, file: str, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Launch:
        """Return a function that runs a graph from and into these buffers; it keeps them alive."""

    def run(self, file: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run a graph once on values of the host; its engine is loaded when it is first needed."""

    def capture(self, launches: Sequence[Launch]) -> Launch | None:
        """Return one launch that replays all of these in order (a CUDA graph), or None where there is no such thing."""
