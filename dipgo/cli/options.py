"""What commands take: shared arguments, and an option for each field of a config."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import wraps
from pathlib import Path
from textwrap import wrap
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer
from pydantic.fields import FieldInfo

from dipgo.base.config import Config, checked, is_model, plain_types, unknown
from dipgo.base.errors import UsageError
from dipgo.base.own_packages import ROOT
from dipgo.cli.places import bundle_at, model_at, subnet_at

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Built-in name, diffusers folder, or hub id.",
        callback=model_at,
        autocompletion=lambda: sorted(index.parent.name for index in ZOO.glob("*/model_index.json")),
    ),
]
BundleArgument = Annotated[
    Path,
    typer.Argument(
        metavar="BUNDLE",
        help="Folder written by 'dipgo export', or the one above it by 'dipgo compile' or 'dipgo demo'.",
        callback=bundle_at,
    ),
]
SubNetsArgument = Annotated[
    list[Path],
    typer.Argument(
        metavar="SUBNET...",
        help="JSON files written by 'dipgo search', of one model.",
        callback=lambda files: [subnet_at(file) for file in files],
    ),
]
OutputOption = Annotated[Path, typer.Option("--output", "-o", help="Where to write.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace an output that exists.")]
RandomWeightsOption = Annotated[
    bool, typer.Option("--random-weights", help="Draw the weights: for structure and speed, images are meaningless.")
]
SourceOption = Annotated[
    str | None, typer.Option("--model", help="Where the model lies now, if not where it was searched.")
]

ZOO = ROOT / "dipgo" / "zoo"
SET, SHOW = "settings", "show_settings"
METAVARS = {int: "INTEGER", float: "FLOAT", Path: "PATH"}


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command that takes an option for each field in the place of each parameter that is a config.

    Fields of one name in two configs are one option. Values are read by the config, so messages are the same as for
    recipes and from Python.
    """
    hints = get_type_hints(command, include_extras=True)
    configs = {name: kind for name, kind in hints.items() if is_model(kind) and issubclass(kind, Config)}
    parameters: dict[str, inspect.Parameter] = {}
    for name, parameter in inspect.signature(command).parameters.items():
        if name in configs:
            for option in _options(configs[name]):
                parameters.setdefault(option.name, option)
        else:
            parameters[name] = parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)

    @wraps(command)
    def run(**values: Any) -> None:
        own = {name: value for name, value in values.items() if name in inspect.signature(command).parameters}
        command(**own, **{name: _config(kind, values) for name, kind in configs.items()})

    run.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
    run.__annotations__ = {name: parameter.annotation for name, parameter in parameters.items()}
    return run


def settings_text(kind: type[Config]) -> str:
    """Return a text on the fields that ``--set`` changes: default, bounds, other defaults, meaning."""
    lines, others = ["Settings, for --set NAME=VALUE."], getattr(kind, "OTHER_DEFAULTS", {})
    for name in _through_set(kind):
        field = kind.model_fields[name]
        changed = [f"{values[name]} with {flag}" for flag, values in others.items() if name in values]
        lines.append("; ".join([f"  {name} = {_default(field) or 'none'}{_bounds(field)}", *changed]))
        lines += wrap(field.description or "", 78, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def _config(kind: type[Config], values: Mapping[str, Any]) -> Config:
    chosen = {name: values[name] for name in kind.model_fields if values.get(name) is not None}
    names = _through_set(kind)
    chosen |= _pairs(values.get(SET) or (), names) if names else {}

    def name_it(name: str, value: Any) -> str:
        return f"--set {name}={value}" if name in names else f"{_flags(name, kind.model_fields[name])[0]} {value}"

    return checked(kind, chosen, name_it)


def _pairs(texts: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    pairs = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if name not in names:
            raise UsageError(unknown("setting", name, names))
        if not equals:
            raise UsageError(f"--set {text}: give NAME=VALUE")
        pairs[name] = value
    return pairs


def _through_set(kind: type[Config]) -> list[str]:
    return [name for name in kind.model_fields if name in getattr(kind, "SETTINGS", ())]


def _options(kind: type[Config]) -> Iterator[inspect.Parameter]:
    names = _through_set(kind)
    fields = sorted(kind.model_fields.items(), key=lambda named: not named[1].is_required())
    yield from (_option(name, field) for name, field in fields if name not in names)
    if names:
        help_text = "Change a setting of the search, see --show-settings; may be given again."
        info = typer.Option("--set", metavar="NAME=VALUE", help=help_text)
        yield _parameter(SET, Annotated[list[str] | None, info], None)

        def show(asked: bool) -> None:
            if asked:
                typer.echo(settings_text(kind))
                raise typer.Exit

        info = typer.Option(
            "--show-settings", help="Show the settings with their meaning.", is_eager=True, callback=show
        )
        yield _parameter(SHOW, Annotated[bool, info], False)


def _option(name: str, field: FieldInfo) -> inspect.Parameter:
    kind, flags = plain_types(field.annotation)[0], _flags(name, field)
    if kind is bool:
        return _parameter(name, Annotated[bool, typer.Option(*flags, help=field.description)], field.default)
    default = f" [default: {_default(field)}]" if _default(field) else ""
    options: dict[str, Any] = {"help": f"{field.description}{_bounds(field)}{default}", "metavar": _metavar(kind)}
    if field.is_required():
        return _parameter(name, Annotated[str, typer.Option(*flags, **options)], inspect.Parameter.empty)
    info = typer.Option(*flags, **options, show_default=False)
    repeatable = get_origin(kind) is tuple and not field.metadata  # others come joined by commas
    return _parameter(name, Annotated[list[str] | None if repeatable else str | None, info], None)


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _flags(name: str, field: FieldInfo) -> list[str]:
    extra = field.json_schema_extra
    own = extra.get("flags") if isinstance(extra, dict) else None
    flag = name.replace("_", "-")
    return [str(each) for each in own] if isinstance(own, list) else [f"--{flag}"]


def _metavar(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    if get_origin(kind) is tuple:
        kind = get_args(kind)[0]
    return METAVARS.get(kind, "TEXT")


def _default(field: FieldInfo) -> str:
    if isinstance(field.default, tuple):
        return ",".join(map(str, field.default))
    return "" if field.default is None or field.is_required() else str(field.default)


def _bounds(field: FieldInfo) -> str:
    bounds = {
        name: getattr(each, name) for each in field.metadata for name in ("gt", "ge", "le") if hasattr(each, name)
    }
    low = f"{bounds['ge']}<=" if "ge" in bounds else f"{bounds['gt']}<" if "gt" in bounds else ""
    high = f"<={bounds['le']}" if "le" in bounds else ""
    return f" [{low}x{high}]" if bounds else ""
