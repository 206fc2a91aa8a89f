"""What Linux tells of processes: whether they run, how they ended, whether it was for want of memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
from pathlib import Path

import psutil

DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)


def oom_kills() -> int:
    """Return how many processes the kernel of this machine has killed for want of memory, of a cgroup or of its own."""
    with contextlib.suppress(OSError):
        if count := re.search(r"^oom_kill (\d+)", Path("/proc/vmstat").read_text(), re.MULTILINE):
            return int(count[1])
    return 0


def has_ended(pid: int) -> bool:
    """Return whether a process is gone, or is but waited for."""
    return _status(pid) in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)


def is_stopped(pid: int) -> bool:
    """Return whether a process is kept from running, by SIGSTOP or a debugger."""
    return _status(pid) in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)


def exit_code(pid: int) -> int | None:
    """Return the exit code of another process's child, minus the signal that ended it; None once its parent has it."""
    try:
        return os.waitstatus_to_exitcode(int(Path(f"/proc/{pid}/stat").read_text().rsplit(maxsplit=1)[1]))
    except (OSError, ValueError):
        return None


def end_with_parent() -> None:
    """In a child that was just forked: let it have SIGTERM when its parent is killed, not live on without a gate."""
    ctypes.CDLL(None).prctl(DEATH_SIGNAL, signal.SIGTERM)


def _status(pid: int) -> str:
    try:
        return str(psutil.Process(pid).status())
    except psutil.NoSuchProcess:
        return str(psutil.STATUS_DEAD)
