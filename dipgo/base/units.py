"""Durations and sizes as text, the same in all tables and messages."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Return seconds as text: in minutes from two on, in hours from two on."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def size(count: int) -> str:
    """Return bytes as text, in powers of 1000."""
    for unit, least in {"GB": 1e9, "MB": 1e6, "kB": 1e3}.items():
        if count >= least:
            return f"{count / least:.2f} {unit}"
    return f"{count} B"
