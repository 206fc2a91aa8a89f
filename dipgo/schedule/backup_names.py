"""How the weights of backups are named, in a SubNet's file and wherever a schedule is run."""

from __future__ import annotations


def backup_name(site: str, output: int) -> str:
    """Return the name of a site's backup tensor: ``backup.<site>``, then ``#1``, ``#2`` for further outputs."""
    return f"backup.{site}" + (f"#{output}" if output else "")
