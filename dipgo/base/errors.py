"""Errors that a user can mend: one line that says what is wrong and what to do about it."""

from __future__ import annotations


class DipgoError(Exception):
    """The work failed. The command line prints the message alone and exits with 1."""

    exit_code = 1


class UsageError(DipgoError):
    """What was asked for makes no sense. The command line prints the message alone and exits with 2."""

    exit_code = 2


def not_imported(error: ImportError, package: str, install: str) -> DipgoError:
    """Return the error for a package that cannot be imported: not there, or there and broken, or no memory for it."""
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == package.partition("-")[0]:
        return DipgoError(f"{package} is not installed; {install}")
    return DipgoError(f"{package} is installed, but cannot be loaded ({one_line(error)})")


class DipgoWarning(UserWarning):
    """What a user should know of a result: one line, which the command line prints on stderr."""


def one_line(error: BaseException, limit: int = 160) -> str:
    """Return what an error of a library says, on one line of at most ``limit`` characters; its kind if it is silent."""
    return " ".join(str(error).split())[:limit] or type(error).__name__
