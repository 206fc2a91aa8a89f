"""Errors that a user can mend: one line that says what is wrong and what to do about it."""

from __future__ import annotations

from dipgo.base.text import printable

OUT_OF_MEMORY = (
    "out of memory; end other programs, ask for less (--size, --batch), or allow this process more (ulimit -v)"
)
_SHORT = (
    "cannot allocate memory",
    "can't allocate memory",
    "failed to allocate memory",
    "failed to map segment",
    "out of memory",
    "bad_alloc",
)


class DipgoError(Exception):
    """The work failed. The command line prints the message alone and exits with 1."""

    exit_code = 1

    def __str__(self) -> str:
        """Return the message as one line, whatever it quotes from files."""
        return printable(super().__str__())


class UsageError(DipgoError):
    """What was asked for makes no sense. The command line prints the message alone and exits with 2."""

    exit_code = 2


class DipgoWarning(UserWarning):
    """What a user should know of a result: one line, which the command line prints on stderr."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was too little memory, which libraries say in errors of many classes."""
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in _SHORT)


def not_imported(package: str, error: ImportError, cure: str) -> DipgoError:
    """Return why a package cannot be imported: it is not installed, which has a cure, or something else is wrong."""
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == package.partition("-")[0]:
        return DipgoError(f"{package} is not installed; {cure}")
    return DipgoError(f"{package} cannot be imported: {OUT_OF_MEMORY if is_out_of_memory(error) else error}")


def one_line(error: BaseException, limit: int = 160) -> str:
    """Return what an error of a library says, on one line of at most ``limit`` characters; its kind if it is silent."""
    return " ".join(str(error).split())[:limit] or type(error).__name__
