"""What many tests need: how far arrays are apart, refusals in one line, threads, a full disk, other processes."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dipgo.base.errors import DipgoError, UsageError

ROOT = Path(__file__).parents[1]


def error(actual: Any, expected: Any) -> float:
    """Return the distance of two arrays of one shape, relative to the expected one's norm."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    return float(np.linalg.norm(actual.astype(float) - expected) / np.linalg.norm(expected.astype(float)))


@contextmanager
def refused(message: str, kind: type[Exception] = DipgoError) -> Iterator[pytest.ExceptionInfo[Exception]]:
    """The block raises ``kind``, with a line that the pattern ``message`` is found in."""
    with pytest.raises(kind, match=message) as caught:
        yield caught
    assert "\n" not in str(caught.value)


@contextmanager
def misused(message: str) -> Iterator[pytest.ExceptionInfo[Exception]]:
    """As :func:`refused`, of a usage that makes no sense."""
    with refused(message, UsageError) as caught:
        yield caught


def in_threads(work: Callable[..., Any], arguments: Iterable[Any]) -> dict[Any, Any]:
    """Run ``work`` on each argument at the same time; return the results by argument."""
    arguments = list(arguments)
    with ThreadPoolExecutor(len(arguments)) as pool:
        return dict(zip(arguments, pool.map(work, arguments), strict=True))


@contextmanager
def small_disk(size: int = 10_000) -> Iterator[None]:
    """Let no file grow beyond so many bytes: the kernel then refuses as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def python(code: str, *arguments: object, without: str = "", **options: Any) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own, in which modules, joined by blanks, cannot be imported."""
    block = f"import sys\nsys.modules.update(dict.fromkeys({without.split()!r}))\n"
    command = [sys.executable, "-c", block + code, *map(str, arguments)]
    options = {"check": True, "env": os.environ | {"PYTHONPATH": str(ROOT)}} | options
    return subprocess.run(command, capture_output=True, text=True, **options)  # noqa: PLW1510 - in options
