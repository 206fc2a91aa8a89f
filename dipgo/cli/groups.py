"""Commands in groups, each with a summary of one line and an example; a group of commands alone shows its help."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperGroup

Commands = dict[Callable[..., None], str]
"""Functions that are commands, each with an example."""


class Grouped(TyperGroup):
    """Lists its commands under the titles that they were added with."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        titles: dict[str, list[tuple[str, str]]] = {}
        width = max(map(len, self.commands))
        for name, command in self.commands.items():
            title = str(getattr(command, "rich_help_panel", None) or "Commands")
            summary = command.get_short_help_str(formatter.width - width)
            titles.setdefault(title, []).append((name.ljust(width), summary))
        for title, rows in titles.items():
            with formatter.section(title):
                formatter.write_dl(rows)


def group(help_text: str) -> typer.Typer:
    """Return an empty group of commands."""
    return typer.Typer(
        cls=Grouped,
        help=help_text,
        invoke_without_command=True,
        context_settings={"help_option_names": ["-h", "--help"]},
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )


def add(
    app: typer.Typer,
    commands: Commands,
    title: str | None = None,
    adapt: Callable[[Callable[..., None]], Callable[..., Any]] = lambda command: command,
) -> None:
    """Add commands by their functions, with an example of each, under a title.

    The first paragraph of a function's docstring is its summary.
    """
    for command, example in commands.items():
        name = command.__name__.rstrip("_").replace("_", "-")
        summary = (command.__doc__ or "").partition("\n\n")[0]
        epilog = f"\b\nExample:\n  {example}"
        app.command(name, short_help=summary.rstrip("."), epilog=epilog, rich_help_panel=title)(adapt(command))


def show_help(context: typer.Context) -> None:
    """Show the help of a group that is called without a command."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
