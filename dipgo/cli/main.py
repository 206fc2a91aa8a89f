"""The command line. With :mod:`dipgo.api`, which it calls, the only place that knows all packages."""

from __future__ import annotations

import os
import signal
import sys
import traceback
import warnings
from pathlib import Path
from types import FrameType
from typing import Any

import typer
from typer.exceptions import TyperException

from dipgo.base.errors import OUT_OF_MEMORY, DipgoError, DipgoWarning, is_out_of_memory
from dipgo.base.own_packages import check_packages, leave_working_directory
from dipgo.base.progress import close_bars, is_main
from dipgo.base.text import printable

INTERRUPTED = 130  # what typer makes of Ctrl-C
TRACEBACK = "DIPGO_TRACEBACK"


def application() -> typer.Typer:
    """Return the commands, a module for each kind; those import what they need when they run."""
    from dipgo.cli.bench import bench, verify
    from dipgo.cli.build import build
    from dipgo.cli.checkpoint import import_checkpoint
    from dipgo.cli.compile import compile_
    from dipgo.cli.doctor import doctor
    from dipgo.cli.export import export, inspect
    from dipgo.cli.judge import judge
    from dipgo.cli.options import settings_text, with_options
    from dipgo.cli.push import push
    from dipgo.cli.recipe import app as recipe
    from dipgo.cli.reweight import reweight
    from dipgo.cli.run import run
    from dipgo.cli.search import import_, models, search
    from dipgo.cli.serve import deploy, serve
    from dipgo.searching.config import SearchConfig

    app = typer.Typer(
        help="Search which blocks of a diffusion model to skip, compile what is left into static ONNX graphs, prove "
        "it, measure it.",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    to_subnet = (models, search, import_, import_checkpoint, judge)
    to_images = (export, reweight, build, verify, run, bench, inspect, compile_, deploy, serve, push, doctor)
    for command in (*to_subnet, *to_images):
        epilog = settings_text(SearchConfig) if command is search else None
        app.command(name=command.__name__.rstrip("_").replace("_", "-"), epilog=epilog)(with_options(command))
    app.add_typer(recipe, name="recipe")
    return app


def main() -> None:
    """Run the command line: errors are one line on stderr; exit codes are 0, 1 (failed) and 2 (bad usage)."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # to look for them takes longer than all else
    warnings.showwarning = _warn
    leave_working_directory()
    os.environ["PYTHONSAFEPATH"] = "1"  # for the processes that are started from here
    try:
        if sys.argv[1:2] != ["doctor"]:  # which says more
            check_packages()
        code = application()(standalone_mode=False)
    except DipgoError as error:
        code = _fail(str(error), error.exit_code)
    except TyperException as error:
        code = _fail(f"{error.format_message().rstrip('.')}; see 'dipgo --help'", 2)
    except OSError as error:  # of the system, such as a name that is too long; what we know has a better line
        known = f"{error.filename or 'the system'}: {error.strerror or error}"
        code = _fail(OUT_OF_MEMORY if is_out_of_memory(error) else known, 1)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Exception as error:
        if not is_out_of_memory(error) and os.environ.get(TRACEBACK):
            raise
        code = _fail(OUT_OF_MEMORY if is_out_of_memory(error) else _fault(error), 1)
    if code == INTERRUPTED:
        code = _fail("interrupted; what was not finished was not written", 1)
    sys.exit(int(code or 0))


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
