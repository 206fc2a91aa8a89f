"""What is shown while work goes on, on stderr: bars in a terminal, elsewhere a line per phase if somebody asks."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

Report = Callable[[str, int, int, str], None]
"""Called with the phase, the iteration, how many there are, and a short figure; of none, the figure is a remark."""

LINES = "DIPGO_PROGRESS"
"""With ``lines`` in it, phases are told by lines where there is no terminal; the command line sets it."""
_BEGIN = time.monotonic()


def silent(phase: str, iteration: int, total: int, figure: str) -> None:
    """Report nothing."""


def bar(label: str) -> Any:
    from tqdm import tqdm

    def progress(items: Iterable[Any]) -> Iterator[Any]:
        if not sys.stderr.isatty():
            _line(label)
        return iter(tqdm(items, desc=label, leave=False, disable=None))  # None: shown in a terminal alone

    return progress


def spinner(label: str) -> Any:
    return Progress().spinner(label)


@dataclass(frozen=True)
class Progress:
    """What shows progress: always, never, or None where somebody may be looking, which is in a terminal."""

    shown: bool | None = None

    @property
    def visible(self) -> bool:
        return sys.stderr.isatty() if self.shown is None else self.shown

    @contextmanager
    def spinner(self, label: str) -> Iterator[None]:
        """Show that work goes on where its length is not known beforehand."""
        if not self.visible:
            if self.shown is None:
                _line(label)
            yield
            return
        from rich.console import Console

        with Console(stderr=True).status(f"{label} …"):
            yield

    @contextmanager
    def phases(self) -> Iterator[Report]:
        """Yield a report function that shows one progress bar per phase, which ends where another one begins."""
        if not (self.visible and is_main()):
            yield _lines() if self.shown is None and _lines_wanted() else silent
            return
        from tqdm import tqdm

        bar: tqdm[Any] | None = None
        shown = ""

        def report(phase: str, iteration: int, total: int, figure: str) -> None:
            nonlocal bar, shown
            if not total:
                if figure:
                    tqdm.write(f"{phase}: {figure}", file=sys.stderr)
                return
            if bar is None or shown != phase:
                if bar is not None:
                    bar.close()
                bar, shown = tqdm(total=total, desc=phase), phase
            bar.total = total  # in some phases it grows
            bar.set_postfix_str(figure, refresh=iteration == total)
            bar.update(iteration - bar.n)

        try:
            yield report
        finally:
            if bar is not None:
                bar.close()


def _lines() -> Report:
    """Return a report function that prints a line where a phase begins, and remarks."""
    shown = ""

    def report(phase: str, iteration: int, total: int, figure: str) -> None:
        nonlocal shown
        if not total and figure:
            _line(f"{phase}: {figure}")
        elif total and phase != shown:
            shown = phase
            _line(phase)

    return report


def _line(text: str) -> None:
    """Print a line that begins with the minutes and seconds since the start, where lines are wanted."""
    if _lines_wanted():
        minutes, seconds = divmod(int(time.monotonic() - _BEGIN), 60)
        print(f"{minutes:3}:{seconds:02}  {text}", file=sys.stderr, flush=True)


def _lines_wanted() -> bool:
    return os.environ.get(LINES) == "lines" and is_main()


def close_bars() -> None:
    """Close the bars that are still on the screen, so that what is printed next has a line of its own."""
    std = sys.modules.get("tqdm.std")
    for each in list(std.tqdm._instances) if std else []:
        each.close()


def is_main() -> bool:
    """Whether this is the first of the processes that ``accelerate launch`` started, or the only one."""
    return os.environ.get("RANK", "0") == "0"
