"""A pickle read as data.

A pickle is a program for a stack machine, which ``pickle.load`` lets import and call whatever it names. This machine
knows the opcodes that build plain values and no others. A global becomes a :class:`Name` and must be one that the
reader expects; a call becomes a :class:`Call`, a record of what was to be called. Nothing is imported, called or
instantiated, so there is nothing to escape from.
"""

from __future__ import annotations

import pickletools
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, BinaryIO

PERSISTENT = "persistent id"  # what a reference to something outside the pickle is recorded as a call of

_CONSTANTS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("SHORT_BINUNICODE", "BINUNICODE", "SHORT_BINBYTES", "BINBYTES"),
}
_WORDS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_MOST_PENDING = 100_000  # values on the stack; picklers batch by a thousand
_LONGEST_KEY = 8  # parts


@dataclass(frozen=True)
class Name:
    """A global that the pickle names, as ``module.name``."""

    name: str


@dataclass(frozen=True, eq=False)
class Call:
    """A call that the pickle asks for; it is not made.

    It equals itself alone: arguments may hold themselves, or one value along more ways than can be counted.
    """

    name: str
    arguments: tuple[Any, ...]


def read_pickle(stream: BinaryIO, names: Collection[str]) -> Any:
    """Read one pickle (protocols 2 to 5) and leave the stream behind it.

    Args:
        stream: a seekable binary stream.
        names: the globals that may occur, as ``module.name``.

    Returns:
        Lists, tuples, dicts (keys: strings, numbers and short flat tuples of them), constants, :class:`Name`,
        :class:`Call`. A value may be held many times, and a list or dict hold itself: walk none, and compare none, of
        which the depth is not known. Time and memory are linear in the length of the pickle.

    Raises:
        ValueError: not a pickle, a global that is not among ``names``, or an opcode that plain values do not need.
    """
    machine = _Machine(names)
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            machine.step(opcode.name, argument)
            if len(machine.stack) > _MOST_PENDING:
                raise _Refused("the pickle holds more values at a time than gates need")
        (result,) = machine.stack
    except _Refused:
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError("the pickle is damaged") from error
    return result


class _Refused(ValueError):
    """A pickle that is whole, and asks for more than plain values."""


class _Machine:
    def __init__(self, names: Collection[str]) -> None:
        self.names = names
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def step(self, opcode: str, argument: Any) -> None:  # noqa: PLR0912 - one branch an opcode
        stack = self.stack
        match opcode:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "MARK":
                self.marks.append(len(stack))
            case _ if opcode in _CONSTANTS:
                stack.append(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append(_WORDS[opcode])
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE":
                stack.append(tuple(self.above_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self.above(len(stack) - int(opcode[-1]))))
            case "APPEND":
                self.append(self.above(len(stack) - 1))
            case "APPENDS":
                self.append(self.above_mark())
            case "SETITEM":
                self.set_items(self.above(len(stack) - 2))
            case "SETITEMS":
                self.set_items(self.above_mark())
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "GLOBAL":
                stack.append(self.name(*argument.split(" ")))
            case "STACK_GLOBAL":
                stack.append(self.name(*self.above(len(stack) - 2)))
            case "REDUCE":
                function, arguments = self.above(len(stack) - 2)
                if not isinstance(function, Name) or not isinstance(arguments, tuple):
                    raise TypeError("a call without a name or a tuple of arguments")
                stack.append(Call(function.name, arguments))
            case "BINPERSID":
                stack.append(Call(PERSISTENT, (stack.pop(),)))
            case _:
                raise _Refused(f"the pickle uses the opcode {opcode}, which plain data do not need; nothing was run")

    def above(self, start: int) -> list[Any]:
        if start < 0:
            raise IndexError("the stack is too short")
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def above_mark(self) -> list[Any]:
        return self.above(self.marks.pop())

    def append(self, values: list[Any]) -> None:
        self.stack[-1].extend(values)

    def set_items(self, values: list[Any]) -> None:
        for key, value in zip(values[::2], values[1::2], strict=True):
            parts = key if isinstance(key, tuple) else (key,)
            if len(parts) > _LONGEST_KEY or not all(isinstance(part, str | int) for part in parts):
                raise _Refused("a key of a dict in the pickle is neither text, a number nor a short tuple of them")
            self.stack[-1][key] = value

    def name(self, module: str, name: str) -> Name:
        full = ".".join((module, name))
        if full not in self.names:
            raise _Refused(f"the pickle names {full[:80]!r}, which gates do not need; nothing was run")
        return Name(full)
