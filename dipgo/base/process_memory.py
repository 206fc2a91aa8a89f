"""What this process holds in memory, as the system counts it, in bytes."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil

_STATUS = Path("/proc/self/status")


def resident() -> int:
    """Return what is resident now."""
    return int(psutil.Process().memory_info().rss)


def resident_peak() -> int:
    """Return the most that was resident at once since the process began."""
    status = _STATUS.read_text().splitlines() if _STATUS.exists() else []
    for line in status:  # getrusage would count the peak of the process that started this one, too
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    windows = getattr(psutil.Process().memory_info(), "peak_wset", None)
    if windows is not None:
        return int(windows)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, kibibytes elsewhere
