"""What a run folder keeps of a run's course: figures as JSON lines, TensorBoard on request, and the seconds."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dipgo.base import install
from dipgo.base.errors import DipgoError
from dipgo.base.files import full_disk, new_file
from dipgo.base.process_memory import resident_peak
from dipgo.base.records import read_json


class Journal:
    """``journal.jsonl`` in a run folder, one line an iteration: ``phase``, ``iteration`` (from 1), and its figures.

    With ``tensorboard`` the figures go to event files too, one folder a phase under ``tensorboard/``.

    Raises:
        DipgoError: ``tensorboard`` without that package, or a full disk.
    """

    def __init__(self, folder: Path, tensorboard: bool = False) -> None:
        self.path = folder / "journal.jsonl"
        self._events = event_writer() if tensorboard else None
        self._writers: dict[str, Any] = {}
        self._folder = folder

    def rewind(self, phase: str, iteration: int) -> None:
        """Forget what a phase wrote after ``iteration``, where it goes on from an earlier checkpoint."""
        if self.path.exists():
            lines = [line for line in self.path.read_text().splitlines() if _stands(line, phase, iteration)]
            with new_file(self.path) as draft:
                draft.write_text("".join(line + "\n" for line in lines))
        if self._events:
            # Iterations from purge_step on that an earlier process logged are hidden.
            self._writers[phase] = self._events(str(self._folder / "tensorboard" / phase), purge_step=iteration + 1)

    def write(self, phase: str, iteration: int, figures: Mapping[str, float]) -> None:
        """Append one line, at once."""
        line = json.dumps({"phase": phase, "iteration": iteration, **figures})
        with full_disk(self.path), self.path.open("a") as stream:
            stream.write(line + "\n")
        if phase in self._writers:
            with full_disk(self._folder / "tensorboard"):
                for name, value in figures.items():
                    self._writers[phase].add_scalar(name, value, iteration)
                self._writers[phase].flush()


class Clock:
    """Seconds by part of a search, in all the processes that worked on it one after the other.

    They are kept in ``clock.json`` of a run folder whenever a checkpoint is. What was done after the newest checkpoint
    before a kill is done again, and counted once.

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


def peak_memory(device: torch.device) -> int:
    """Return the most bytes held so far: allocated on the accelerator, or resident where there is none."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resident_peak()


def event_writer() -> Any:
    """Return TensorBoard's writer; DipgoError where the package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise DipgoError(
            f"TensorBoard logs need the package 'tensorboard', which is not installed; {install.LOGS}"
        ) from error
    return SummaryWriter


def _stands(line: str, phase: str, iteration: int) -> bool:
    """Whether a line stays: one of another phase, or early enough. A line that a kill cut short goes."""
    try:
        record = json.loads(line)
        return bool(record["phase"] != phase or record["iteration"] <= iteration)
    except (json.JSONDecodeError, KeyError, TypeError):
        return False
