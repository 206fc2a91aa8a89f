"""What a long stage says of itself: how far it is, and in one line what could not be measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from dipgo.base.errors import DipgoError

Progress = Callable[[str, int, int, str], None]
"""Called with the phase, how many of its parts are done, how many there are, and a short figure, as in the search."""


class Bars:
    """One tqdm bar a phase, on stderr; a phase ends when all its parts are done or another one begins."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._phase = ""

    def __call__(self, phase: str, done: int, total: int, figure: str = "") -> None:
        if self._bar is None or self._phase != phase:
            self.close()
            self._phase = phase
            self._bar = tqdm(
                desc=phase,
                total=total,
                bar_format="{desc} {bar:24} {n_fmt}/{total_fmt} {elapsed}{postfix}",
                disable=None,  # shown in a terminal alone
            )
        self._bar.total = total
        self._bar.n = done
        self._bar.set_postfix_str(figure, refresh=False)
        self._bar.refresh()
        if done >= total:
            self.close()

    def close(self) -> None:
        """End the bar that is shown."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def silent(phase: str, done: int, total: int, figure: str) -> None:
    """Show nothing."""


class NotMeasuredError(Exception):
    """A program that could not be measured: the message is one line that the report prints in its row."""


def one_line(error: BaseException, limit: int = 160) -> str:
    """Return an error as one line; its class too where the project did not raise it."""
    text = " ".join(str(error).split())[:limit]
    own = isinstance(error, DipgoError | NotMeasuredError)
    return text if own else f"{type(error).__name__}: {text}".rstrip(": ")
