"""Prompts in a text file, one a line."""

from __future__ import annotations

from pathlib import Path

from dipgo.base.errors import DipgoError
from dipgo.base.inputs import read_text


def read_prompts(path: Path) -> list[str]:
    """Read one prompt a line, UTF-8; blank lines are left out.

    Raises:
        DipgoError: a file that is missing, unreadable, not UTF-8, or holds no prompt.
    """
    lines = read_text(path, "prompt file").splitlines()
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise DipgoError(f"{path}: no prompt in it; give one a line")
    return prompts
