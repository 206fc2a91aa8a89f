"""How long the parts of a search take, in all the processes that work on them one after the other."""

from __future__ import annotations

import json
import time
from pathlib import Path

from dipgo.base.errors import DipgoError
from dipgo.base.files import new_file
from dipgo.base.records import read_json


class Clock:
    """Seconds by part, kept in ``clock.json`` of a run folder whenever a checkpoint is.

    What was done after the newest checkpoint before a kill is done again, and counted once.

    Raises:
        DipgoError: a file of that name that a clock did not write.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._path = folder / "clock.json" if folder else None
        self._kept: dict[str, float] = {}
        self._part, self._begun = "", time.monotonic()
        if self._path and self._path.is_file():
            self._kept = read_json(self._path, "clock of a run")
            if not isinstance(self._kept, dict) or not all(isinstance(n, int | float) for n in self._kept.values()):
                raise DipgoError(f"{self._path}: not a run's clock; remove it")

    def start(self, part: str) -> None:
        """Go on with a part, and no longer with the one before."""
        self._kept[self._part] = self.seconds()
        self._part, self._begun = part, time.monotonic()

    def seconds(self) -> float:
        """Return how long the part that goes on has taken."""
        return self._kept.get(self._part, 0.0) + time.monotonic() - self._begun

    def keep(self) -> None:
        """Write down how long it has taken by now; nothing without a folder."""
        if self._path:
            with new_file(self._path) as draft:
                draft.write_text(json.dumps(self._kept | {self._part: round(self.seconds(), 3)}) + "\n")
