"""What the Python interfaces of TensorRT 10.16, 11.4 and TensorRT-RTX 1.7 have, and objects that check against it.

Recorded from the real bindings, in ``tensorrt_api.json``: for each class its members, and for methods the parameters,
those with a default marked ``=``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

API: dict[str, dict[str, dict[str, list[str] | None]]] = json.loads(
    (Path(__file__).parent / "tensorrt_api.json").read_text()
)


class NotInTheApi(AssertionError):
    """The code uses a name or a call that one of the three versions lacks."""


def check_name(kind: str, name: str) -> None:
    for version, classes in API.items():
        if name not in classes.get(kind, {}):
            raise NotInTheApi(f"{kind}.{name} is not in TensorRT {version}")


def check_call(kind: str, name: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
    check_name(kind, name)
    for version, classes in API.items():
        parameters = classes[kind][name]
        if parameters is None:
            raise NotInTheApi(f"{kind}.{name} is no method in TensorRT {version}")
        names = [parameter.rstrip("=") for parameter in parameters]
        given = [*names[: len(arguments)], *named]
        needed = {parameter for parameter in parameters if not parameter.endswith("=")}
        if len(arguments) > len(names) or len(set(given)) < len(given) or not needed <= set(given) <= set(names):
            raise NotInTheApi(f"{kind}.{name}{names} of TensorRT {version} is called with {arguments}, {named}")


class Checked:
    """An object of the API; what begins with ``_`` is the fake's own."""

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name.startswith("_"):
            return value
        kind = type(self).__name__
        check_name(kind, name)
        if not callable(value):
            return value

        def call(*arguments: Any, **named: Any) -> Any:
            check_call(kind, name, arguments, named)
            return value(*arguments, **named)

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_"):
            check_name(type(self).__name__, name)
        super().__setattr__(name, value)


class Names(type):
    """An enumeration of the API: its members are their own names."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        check_name(cls.__name__, name)
        return Member(f"{cls.__name__}.{name}")


class Member(str):
    def __int__(self) -> int:
        return 0
