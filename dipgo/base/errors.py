"""Errors that a user can mend: one line that says what is wrong and what to do about it."""

from __future__ import annotations

from dipgo.base.text import printable


class DipgoError(Exception):
    """The work failed. The command line prints the message alone and exits with 1."""

    exit_code = 1

    def __str__(self) -> str:
        """Return the message as one line, whatever it quotes from files."""
        return printable(super().__str__())


class UsageError(DipgoError):
    """What was asked for makes no sense. The command line prints the message alone and exits with 2."""

    exit_code = 2


def one_line(error: BaseException, limit: int = 160) -> str:
    """Return what an error of a library says, on one line of at most ``limit`` characters; its kind if it is silent."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


def not_imported(package: str, error: ImportError, cure: str) -> DipgoError:
    """Return why a package cannot be imported: it is not installed, which has a cure, or something else is wrong."""
    if isinstance(error, ModuleNotFoundError) and error.name == package:
        return DipgoError(f"{package} is not installed; {cure}")
    return DipgoError(f"{package} cannot be imported: {import_problem(error)}")


def import_problem(error: ImportError) -> str:
    """Return one line on an import that failed; libraries that cannot be mapped say so in the system's own words."""
    text = str(error)
    short = "Cannot allocate memory" in text or "failed to map segment" in text
    return "out of memory while libraries were loaded; allow this process more" if short else text
