"""The run folder: what a search keeps while it runs, so that a killed one goes on where it was.

``run.json`` holds the settings that the run was begun with (schema ``dipgo.run/1``), ``<phase>.safetensors`` the
newest checkpoint of each phase, ``journal.jsonl`` the figures, ``clock.json`` the seconds, and ``lock`` is locked while
a process runs. A phase that is finished leaves its last checkpoint, and is not repeated. Without a folder a run keeps
nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import BaseFileLock
from torch import nn

from dipgo.base.errors import DipgoError, UsageError
from dipgo.base.files import lock_file, new_file, remove_drafts, sha256_of_json
from dipgo.base.progress import Report, silent
from dipgo.base.records import read_json
from dipgo.searching.checkpoint import CheckpointRecord, pack, read_checkpoint, unpack, write_checkpoint
from dipgo.searching.distributed import ALONE, Processes
from dipgo.searching.journal import Clock, Journal, event_writer

SCHEMA = "dipgo.run/1"


@dataclass(frozen=True)
class Cadence:
    """How often a phase is checkpointed: every so many iterations, or after so many seconds, 0 for never."""

    iterations: int = 0
    seconds: float = 60.0


BY_THE_MINUTE = Cadence()


@dataclass(frozen=True)
class Run:
    """A search under way.

    Attributes:
        folder: where it is kept; None keeps nothing.
        fingerprint: SHA-256 of the settings it was begun with.
        journal: of the main process; None elsewhere and without a folder.
    """

    folder: Path | None = None
    fingerprint: str = ""
    processes: Processes = ALONE
    journal: Journal | None = None
    cadence: Cadence = BY_THE_MINUTE
    report: Report = silent
    clock: Clock = field(default_factory=Clock)
    lock: BaseFileLock | None = None  # keeps other processes out as long as it is there

    def phase(self, name: str) -> Phase:
        """Return the phase of this name (letters, digits and hyphens), where it was left."""
        return Phase(name, self)

    def once(self, name: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Return the arrays that ``make`` gives, made once in the life of the run, by the main process for all."""
        path = self.folder / f"{name}.safetensors" if self.folder else None

        def arrays_of_run() -> dict[str, np.ndarray]:
            if path and path.exists():
                record, tensors = read_checkpoint(path)
                self.check(record, path)
                return {key: value.numpy() for key, value in tensors.items()}
            arrays = make()
            if path:
                tensors = {key: torch.from_numpy(np.ascontiguousarray(array)) for key, array in arrays.items()}
                write_checkpoint(path, self.record(name, 0, {}), tensors)
                self.clock.keep()
            return arrays

        return self.processes.from_main(arrays_of_run)

    def record(self, phase: str, iteration: int, scaler: dict[str, Any]) -> CheckpointRecord:
        return CheckpointRecord(fingerprint=self.fingerprint, phase=phase, iteration=iteration, scaler=scaler)

    def check(self, record: CheckpointRecord, path: Path) -> None:
        """Refuse a checkpoint that another run wrote."""
        if record.fingerprint != self.fingerprint or record.phase != path.stem:
            raise DipgoError(
                f"{path}: a checkpoint of phase '{record.phase}' of another model or of other settings; remove it to "
                "begin its phase anew"
            )


class Phase:
    """One gradient phase of a run: where it starts, what it logs, when it is checkpointed."""

    def __init__(self, name: str, run: Run) -> None:
        self.name, self.run = name, run
        self.path = run.folder / f"{name}.safetensors" if run.folder else None
        self.checkpointed = 0
        self._last = time.monotonic()

    def restore(self, module: nn.Module, optimiser: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> int:
        """Put module, optimiser and scaler where the newest checkpoint left them; returns the iterations done.

        The main process reads, and hands what it has to the others, so that all begin with the same parameters.

        Raises:
            DipgoError: a checkpoint that is damaged, or of another model or other settings.
        """

        def begin() -> tuple[int, dict[str, torch.Tensor], dict[str, Any]]:
            if self.path is None or not self.path.exists():
                return 0, pack(module, optimiser), scaler.state_dict()
            record, tensors = read_checkpoint(self.path)
            self.run.check(record, self.path)
            return record.iteration, tensors, record.scaler

        self.checkpointed, tensors, scaling = self.run.processes.from_main(begin)
        try:
            unpack(tensors, module, optimiser)
        except (ValueError, KeyError) as error:
            raise DipgoError(
                f"{self.path}: a checkpoint of another model ({error}); give another --run-folder"
            ) from error
        scaler.load_state_dict(scaling)
        if self.run.journal:
            self.run.journal.rewind(self.name, self.checkpointed)
        self._last = time.monotonic()
        return self.checkpointed

    def due(self, iteration: int) -> bool:
        """Whether to checkpoint after ``iteration``; by the clock of the main process, so ask that one."""
        cadence = self.run.cadence
        by_count = cadence.iterations > 0 and iteration % cadence.iterations == 0
        return by_count or 0 < cadence.seconds <= time.monotonic() - self._last

    def keep(
        self, iteration: int, module: nn.Module, optimiser: torch.optim.Optimizer, scaler: torch.amp.GradScaler
    ) -> None:
        """Write a checkpoint after ``iteration``; the main process writes, all learn whether it could.

        Raises:
            DipgoError: a full disk; the checkpoint before stays.
        """
        path = self.path
        if path is None:
            return

        def write() -> None:
            try:
                record = self.run.record(self.name, iteration, scaler.state_dict())
                write_checkpoint(path, record, pack(module, optimiser))
                self.run.clock.keep()
            except DipgoError as error:
                raise DipgoError(f"{error}; {self.standing()}") from error

        self.run.processes.from_main(write)
        self.checkpointed, self._last = iteration, time.monotonic()

    def tell(self, iteration: int, total: int, figures: Mapping[str, float]) -> None:
        """Report and log an iteration (from 1): ``loss``, ``kept`` (MACs, as a ratio) and whatever else there is."""
        share = f", kept {figures['kept']:.1%}" if "kept" in figures else ""
        self.run.report(self.name, iteration, total, f"loss {figures['loss']:.2e}{share}")
        if self.run.journal:
            self.run.journal.write(self.name, iteration, figures)

    def standing(self) -> str:
        """Say in a few words what is kept."""
        if self.path is None:
            return "nothing was kept, a --run-folder would"
        if not self.checkpointed:
            return f"no checkpoint of phase '{self.name}' was written before"
        return f"the checkpoint of iteration {self.checkpointed} is kept in {self.path}"


def open_run(
    folder: Path | None,
    settings: Mapping[str, Any],
    resume: bool = False,
    tensorboard: bool = False,
    cadence: Cadence = BY_THE_MINUTE,
    processes: Processes = ALONE,
    report: Report = silent,
) -> Run:
    """Begin a run in a new folder, or go on with the one that lies there.

    Args:
        settings: everything that the result depends on, the model's fingerprints among them, as JSON values.
        resume: go on where there is something to go on with; else an existing folder is refused.

    Raises:
        UsageError: a folder that exists, without ``resume``.
        DipgoError: a folder of another model, of other settings, that another process runs in, or that is no run
            folder.
    """
    settings = json.loads(json.dumps(settings))
    if folder is None:
        return Run(None, sha256_of_json(settings), processes, None, cadence, report)
    path = folder / "run.json"
    locks: list[BaseFileLock] = []

    def begin() -> None:
        assert folder is not None
        if tensorboard:
            event_writer()  # refused before anything is written
        if folder.exists() and not resume:
            raise UsageError(f"{folder} exists; --resume goes on with it, or give another --run-folder")
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"{folder}: is a file; give a folder to --run-folder")
        if path.exists():
            _compare(folder, read_json(path, "run folder"), settings)
        elif folder.exists() and any(folder.iterdir()):
            raise DipgoError(f"{folder}: holds files but no run.json; give a folder of its own to --run-folder")
        else:
            with new_file(path) as draft:
                draft.write_text(json.dumps({"schema": SCHEMA, "settings": settings}, indent=2) + "\n")
        locks.append(lock_file(folder / "lock", "wait for it, or give another --run-folder"))
        remove_drafts(folder)
        Clock(folder)  # one that cannot be read ends all processes, not this one alone

    processes.from_main(begin)
    journal = Journal(folder, tensorboard) if processes.main else None
    clock = Clock(folder if processes.main else None)
    lock = locks[0] if locks else None
    return Run(folder, sha256_of_json(settings), processes, journal, cadence, report, clock, lock)


def begun_with(folder: Path, name: str) -> Any:
    """Return the setting ``name`` that the run in a folder was begun with; None where no run lies there."""
    path = folder / "run.json"
    record = read_json(path, "run folder") if path.is_file() else {}
    settings = record.get("settings") if isinstance(record, dict) else None
    return settings.get(name) if isinstance(settings, dict) else None


def _compare(folder: Path, record: Any, settings: Mapping[str, Any]) -> None:
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise DipgoError(f"{folder / 'run.json'}: not a run that this version reads; begin anew in another folder")
    then, now = _flat(record.get("settings")), _flat(settings)
    for name in sorted(then.keys() | now.keys()):
        if then.get(name) != now.get(name):
            before, after = (_short(values.get(name)) for values in (then, now))
            raise DipgoError(
                f"{folder}: was begun with {name} = {before}, now it is {after}; resume with what it was begun with, "
                "or begin anew in another --run-folder"
            )


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: value}
    return {
        path: leaf
        for key, inner in value.items()
        for path, leaf in _flat(inner, f"{name}.{key}" if name else key).items()
    }


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
