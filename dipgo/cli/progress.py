"""What is shown while work goes on, on stderr."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dipgo.searching.journal import Report


def bar(label: str) -> Any:
    from tqdm import tqdm

    def progress(items: Iterable[Any]) -> Iterator[Any]:
        return iter(tqdm(items, desc=label, leave=False))

    return progress


@contextmanager
def spinner(label: str) -> Iterator[None]:
    """Show that work goes on where its length is not known beforehand."""
    from rich.console import Console

    with Console(stderr=True).status(f"{label} …"):
        yield


@contextmanager
def phases() -> Iterator[Report]:
    """Yield a report function that shows one progress bar a phase."""
    from tqdm import tqdm

    bars: dict[str, tqdm[Any]] = {}

    def report(phase: str, iteration: int, total: int, figure: str) -> None:
        if not is_main():
            return
        if phase not in bars:
            for before in bars.values():
                before.close()
            bars[phase] = tqdm(total=total, desc=phase)
        bar = bars[phase]
        bar.total = total  # in some phases it grows
        bar.set_postfix_str(figure, refresh=iteration == total)
        bar.update(iteration - bar.n)

    try:
        yield report
    finally:
        for bar in bars.values():
            bar.close()


def is_main() -> bool:
    """Whether this is the first of the processes that ``accelerate launch`` started, or the only one."""
    return os.environ.get("RANK", "0") == "0"
