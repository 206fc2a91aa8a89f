"""Options as values: frozen models, from whose fields the command line, recipes and records take what they hold.

A field has name, type, bounds, help text and default, written once. Free of torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from dipgo.base.errors import UsageError

C = TypeVar("C", bound="Config")


class Config(BaseModel):
    """Options that belong together.

    ``json_schema_extra={"flags": [...]}`` of a field names its option on the command line, where ``--name`` will not
    do.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, coerce_numbers_to_str=True, defer_build=True
    )

    def changed(self: C, **values: Any) -> C:
        """Return the same options but for these; UsageError where they make no sense."""
        return checked(type(self), {name: getattr(self, name) for name in self.model_fields_set} | values)


def option_text(place: str, value: Any) -> str:
    return f"{place} = {value!r}"


def checked(
    kind: type[C], values: Mapping[str, Any], name_it: Callable[[str, Any], str] = option_text, source: str = ""
) -> C:
    """Return values as options.

    Args:
        name_it: from the name of a field (``section.name`` where options are nested) and its value to what messages
            call it.
        source: put before messages, such as a file.

    Raises:
        UsageError: one line on the first thing that is wrong.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise UsageError(source + problem(error, kind, name_it)) from error


def problem(error: ValidationError, kind: type[BaseModel], name_it: Callable[[str, Any], str] = option_text) -> str:
    """Return one line on the first thing that is wrong; for an unknown name with the nearest that there is."""
    problems = error.errors(include_url=False)
    first = next((each for each in problems if each["type"] == "extra_forbidden"), problems[0])
    path = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        return unknown("option", ".".join(path), fields_at(kind, path[:-1]))
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if not path:
        return message
    if first["type"] == "missing":
        return f"{'.'.join(path)} is missing"
    # Parts of a value, such as the second number of several, have no name of their own.
    depth = next((depth for depth in range(len(path)) if path[depth] not in fields_at(kind, path[:depth])), len(path))
    return f"{name_it('.'.join(path[:depth]), first['input'])}: {message}"


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """Return one line on a name that nobody knows: the nearest of those that are known, or all of them."""
    names = list(known)
    near = get_close_matches(name.rpartition(".")[2], names, 1)
    return f"unknown {what} '{name}'; " + (f"did you mean '{near[0]}'?" if near else f"there are {', '.join(names)}")


def fields_at(kind: type[BaseModel], path: Iterable[str]) -> list[str]:
    """Return the names of the fields at a path of sections, none below a plain value."""
    for part in path:
        field = kind.model_fields.get(part)
        inner = [option for option in plain_types(field.annotation) if is_model(option)] if field else []
        if not inner:
            return []
        kind = inner[0]
    return list(kind.model_fields)


def is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def plain_types(annotation: Any) -> list[Any]:
    """Return the types that an annotation allows, None left out."""
    arguments = getattr(annotation, "__args__", ())
    union = type(annotation).__name__ in ("UnionType", "_UnionGenericAlias")
    return [option for option in arguments if option is not type(None)] if union else [annotation]


def _split(value: Any) -> Any:
    """From the command line several come joined by commas; one stands for itself."""
    if isinstance(value, str):
        return [part for part in value.split(",") if part.strip()]
    return [value] if isinstance(value, int | float) else value


def _join(value: Any) -> Any:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else value


Threads = Annotated[int | None, Field(ge=1, le=1024, description="Threads; all cores by default.")]
Seed = Annotated[int, Field(ge=0, description="Seed of everything random.")]
Backend = Annotated[str, Field(description="What runs the graphs; 'dipgo doctor' lists them.")]

Device = Annotated[
    str | None,
    Field(description="cpu, cuda, or cuda:N for a GPU by its number; the backend's own choice by default."),
]

Numbers = Annotated[tuple[float, ...], BeforeValidator(_split)]
"""Numbers, or one string of them joined by commas."""

Text = Annotated[str, BeforeValidator(str)]
"""A text that YAML may take for a number."""
Names = Annotated[str, BeforeValidator(_join)]
"""Names joined by commas, or a list of them."""
