"""Durations and sizes as text, the same in all tables and messages."""

from __future__ import annotations

from collections.abc import Mapping


def duration(seconds: float) -> str:
    """Return seconds as text: in minutes from two on, in hours from two on."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def size(count: int) -> str:
    """Return bytes as text, in powers of 1000."""
    return _scaled(count, {"GB": 1e9, "MB": 1e6, "kB": 1e3}) or f"{count} B"


def large(count: int) -> str:
    """Return a count, such as of MACs, as text: from a million on in M, G or T."""
    return _scaled(count, {"T": 1e12, "G": 1e9, "M": 1e6}) or f"{count:,}"


def _scaled(count: int, units: Mapping[str, float]) -> str:
    return next((f"{count / least:.2f} {unit}" for unit, least in units.items() if count >= least), "")
