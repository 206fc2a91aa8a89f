"""The command line. With :mod:`dipgo.api`, which it calls, the only place that knows all packages."""

from __future__ import annotations

import os
import signal
import sys
import traceback
import warnings
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

from dipgo import __version__
from dipgo.base.errors import OUT_OF_MEMORY, DipgoError, DipgoWarning, UsageError, is_out_of_memory
from dipgo.base.install import missing
from dipgo.base.own_packages import check_packages, leave_working_directory
from dipgo.base.progress import LINES, close_bars, is_main
from dipgo.base.text import printable
from dipgo.cli.groups import Commands, add, group, show_help

INTERRUPTED = 128 + signal.SIGINT  # what typer makes of Ctrl-C
TRACEBACK = "DIPGO_TRACEBACK"


def application() -> typer.Typer:
    """Return the commands, a module for each kind; those import what they need when they run."""
    from dipgo.cli.bench import bench, verify
    from dipgo.cli.build import build
    from dipgo.cli.checkpoint import import_checkpoint
    from dipgo.cli.compile import compile_
    from dipgo.cli.convert import convert
    from dipgo.cli.demo import demo
    from dipgo.cli.doctor import doctor
    from dipgo.cli.export import export, inspect
    from dipgo.cli.judge import judge
    from dipgo.cli.options import with_options
    from dipgo.cli.push import push
    from dipgo.cli.recipe import recipes
    from dipgo.cli.reweight import reweight
    from dipgo.cli.run import run
    from dipgo.cli.search import import_, models, search
    from dipgo.cli.serve import deploy, serve

    titles: dict[str, Commands] = {
        "First steps": {
            demo: "dipgo demo",
            doctor: "dipgo doctor",
            models: "dipgo models",
        },
        "Find a schedule": {
            search: "dipgo search digits-dit --steps 20 --budget 0.35 --preset quick -o subnet.json",
            import_: "dipgo import gates.json --model sd-1.5 --steps 50 -o subnet.json",
            import_checkpoint: "dipgo import-checkpoint model.safetensors -o model",
            convert: "dipgo convert subnet.json --to cache-dit -o mask.json",
            judge: "dipgo judge mine.json theirs.json",
        },
        "Compile and run": {
            export: "dipgo export subnet.json -o bundle",
            reweight: "dipgo reweight bundle --model fused -o fused-bundle",
            build: "dipgo build bundle --backend tensorrt",
            run: "dipgo run bundle --class 3 -n 4 -o out.png",
            inspect: "dipgo inspect bundle",
        },
        "Prove": {
            verify: "dipgo verify bundle",
            bench: "dipgo bench bundle -o report",
        },
        "Serve": {
            serve: "dipgo serve bundle --http-port 8000",
            deploy: "dipgo deploy bundle --triton models",
            push: "dipgo push bundle user/name",
        },
        "All at once": {
            compile_: "dipgo compile digits-dit --steps 20 --budget 0.35 --preset quick -o build/digits",
        },
    }
    app = group(
        "Search which blocks of a diffusion model to skip, compile what is left into static ONNX graphs, prove it, "
        "measure it."
    )
    app.callback()(_root)
    for title, commands in titles.items():
        add(app, commands, title, with_options)
    app.add_typer(recipes(), name="recipe", rich_help_panel="All at once")
    return app


def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    if version:
        typer.echo(f"dipgo {__version__}")
        raise typer.Exit
    show_help(context)


def main() -> None:
    """Run the command line.

    Errors are one line on stderr. Exit codes are 0, 1 (failed), 2 (bad usage), and 130 or 143 of an interrupt by
    Ctrl-C or SIGTERM.
    """
    ended: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        ended.append(128 + number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # to look for them takes longer than all else
    os.environ.setdefault(LINES, "lines")
    warnings.showwarning = _warn
    leave_working_directory()
    os.environ["PYTHONSAFEPATH"] = "1"  # for the processes that are started from here
    try:
        if sys.argv[1:2] != ["doctor"]:  # which says more
            check_packages()
        code = application()(prog_name="dipgo", standalone_mode=False)
    except UsageError as error:
        code = _fail(_with_help(str(error)), error.exit_code)
    except DipgoError as error:
        code = _fail(str(error), error.exit_code)
    except TyperException as error:
        context = getattr(error, "ctx", None)
        message, place = error.format_message().rstrip("."), context.command_path if context else "dipgo"
        code = _fail(f"{message}{' See' if message.endswith('?') else '; see'} '{place} --help'", 2)
    except OSError as error:  # of the system, such as a name that is too long; what we know has a better line
        known = f"{error.filename or 'the system'}: {error.strerror or error}"
        code = _fail(OUT_OF_MEMORY if is_out_of_memory(error) else known, 1)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Exception as error:
        line = missing(error) if isinstance(error, ModuleNotFoundError) else None
        if not line and not is_out_of_memory(error) and os.environ.get(TRACEBACK):
            raise
        code = _fail(OUT_OF_MEMORY if is_out_of_memory(error) else line or _fault(error), 1)
    if code == INTERRUPTED:
        code = _fail("interrupted; what was not finished was not written", (ended or [INTERRUPTED])[0])
    sys.exit(int(code or 0))


def _with_help(message: str) -> str:
    """Add where help is to a message that has no cure of its own: the command's."""
    if ";" in message:
        return message
    words = [word for word in sys.argv[1:3] if word.isidentifier() or word == "import-checkpoint"]
    command = " ".join(words[: 2 if words[:1] == ["recipe"] else 1])
    return f"{message}; see '{' '.join(['dipgo', *command.split()])} --help'"


def _warn(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
    """Print what a user should know of a result, and nothing of what libraries tell their developers."""
    if issubclass(category, DipgoWarning):
        close_bars()
        print(f"dipgo: {printable(str(message))}", file=sys.stderr)


def _fault(error: Exception) -> str:
    """Return one line on an error that nobody foresaw."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"a fault of dipgo's own: {type(error).__name__}{place}: {error}; {TRACEBACK}=1 shows all of it, report it"


def _fail(message: str, code: int) -> int:
    close_bars()
    if is_main():  # all processes stop for one reason
        print(f"dipgo: {printable(message)}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
