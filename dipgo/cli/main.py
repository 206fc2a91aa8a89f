"""The command line. The only place that knows search, export, engines and benchmarks; see :mod:`dipgo.cli`."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

import typer
from typer.exceptions import TyperException

from dipgo.base.errors import DipgoError
from dipgo.cli.build import build
from dipgo.cli.compile import compile_
from dipgo.cli.doctor import doctor
from dipgo.cli.export import export, inspect
from dipgo.cli.progress import is_main
from dipgo.cli.prove import bench, verify
from dipgo.cli.run import run
from dipgo.cli.search import import_, models, search
from dipgo.cli.serve import deploy, serve

app = typer.Typer(
    help="Search which blocks of a diffusion model to skip, compile what is left into static ONNX graphs, prove it, "
    "measure it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for command in (models, search, import_, export, build, verify, run, bench, inspect, compile_, deploy, serve, doctor):
    app.command(name=command.__name__.rstrip("_"))(command)

INTERRUPTED = 130  # what typer makes of Ctrl-C


def main() -> None:
    """Run the command line: errors are one line on stderr; exit codes are 0, 1 (failed) and 2 (bad usage)."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        code = app(standalone_mode=False)
    except DipgoError as error:
        code = _fail(str(error), error.exit_code)
    except TyperException as error:
        code = _fail(f"{error.format_message().rstrip('.')}; see 'dipgo --help'", 2)
    except OSError as error:  # of the system, such as a name that is too long; what we know has a better line
        code = _fail(f"{error.filename or 'the system'}: {error.strerror or error}", 1)
    except KeyboardInterrupt:
        code = INTERRUPTED
    if code == INTERRUPTED:
        code = _fail("interrupted; what was not finished was not written", 1)
    sys.exit(int(code or 0))


def _fail(message: str, code: int) -> int:
    if is_main():  # all processes stop for one reason
        print(f"dipgo: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
