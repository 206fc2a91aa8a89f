"""Prompts in a text file, one a line."""

from __future__ import annotations

from pathlib import Path

from dipgo.base.errors import DipgoError


def read_prompts(path: Path) -> list[str]:
    """Read one prompt a line, UTF-8; blank lines are left out.

    Raises:
        DipgoError: a file that is missing, unreadable, not UTF-8, or holds no prompt.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError as error:
        raise DipgoError(f"{path}: no such prompt file") from error
    except UnicodeDecodeError as error:
        raise DipgoError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8 text, one prompt a line") from error
    except OSError as error:
        raise DipgoError(f"{path}: not a readable prompt file ({error.strerror})") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise DipgoError(f"{path}: no prompt in it; give one a line")
    return prompts
