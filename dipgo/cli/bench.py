"""Whether a bundle is right, and how fast it is."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import Field

from benchmarks.bench.config import BenchConfig
from dipgo.base.config import Backend, Config
from dipgo.base.errors import DipgoError, UsageError
from dipgo.base.units import duration
from dipgo.cli.options import BundleArgument, ForceOption, SourceOption
from dipgo.cli.places import bundle_at

if TYPE_CHECKING:
    from benchmarks.bench.report import ReportRecord


class VerifyConfig(Config):
    """How parity is measured."""

    images: int = Field(
        2, ge=1, description="How many images to compare.", json_schema_extra={"flags": ["--number", "-n"]}
    )
    guidance: float | None = Field(None, description="Guidance scale; by default the one of the search.")
    backend: Backend = "onnxruntime"
    debug: Path | None = Field(
        None, description="Write into this folder where the program diverges: launch, layer, site, and a reproducer."
    )

    def line(self, bundle: Path, model: str | None) -> str:
        """Measure, and return one line on it; DipgoError where parity does not hold."""
        from dipgo import api

        if self.debug:
            from benchmarks.debug.debug import check_debug

            check_debug(self.debug, bundle)
        parity = api.verify(
            bundle, model=model, images=self.images, backend=self.backend, guidance=self.guidance, progress=None
        )
        line, cure = f"{parity.line()}, over {parity.images} images", "export it again, or say where with --debug DIR"
        if self.debug:
            cure = api.debug(bundle, self.debug, parity, model=model, backend=self.backend, progress=None)
            line += "" if not parity.passed else f"; {cure}"
        if not parity.passed:
            raise DipgoError(f"{bundle}: parity does not hold: {line}; {cure}")
        return f"parity holds: {line}"


@contextmanager
def verdict() -> Iterator[None]:
    """End what a command prints in PASSED or FAILED, the time, and the command; wrong usage has no verdict."""
    begin = time.perf_counter()

    def end(word: str) -> None:
        typer.echo(f"{word} in {duration(time.perf_counter() - begin)}: {shlex.join(['dipgo', *sys.argv[1:]])}")

    try:
        yield
    except UsageError:
        raise
    except DipgoError:
        end("FAILED")
        raise
    end("PASSED")


def verify(bundle: BundleArgument, config: VerifyConfig, model: SourceOption = None) -> None:
    """Measure a bundle's parity with diffusers.

    Its images are held against those of the pipeline under the same schedule; the command fails where they differ.
    """
    with verdict():
        typer.echo(config.line(bundle, model))


def bench(
    config: BenchConfig,
    bundles: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="BUNDLE...",
            help="Folder written by 'dipgo export'; further ones of the same model and sampler are set beside it.",
            callback=lambda bundles: [bundle_at(bundle) for bundle in bundles or ()],
            show_default=False,
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where to write.")] = None,
    model: SourceOption = None,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(metavar="A B", help="Set two reports side by side; measures nothing.")
    ] = None,
    force: ForceOption = False,
) -> None:
    """Measure speed and quality against baselines, as a report.

    Bundles are verified first; of one that is not right no speed is told. Or two reports are compared.
    """
    if compare is not None:
        if bundles or config.model_fields_set:
            raise UsageError("--compare takes two reports and measures nothing; leave BUNDLE and --suite out")
        compare_with(*compare, output, force)
        return
    if not bundles or output is None:
        raise UsageError("give a BUNDLE and -o REPORT, or --compare A B")
    from dipgo import api

    with verdict():
        report = api.bench(bundles, output, config, model=model, force=force, progress=None)
        for line in report_lines(report, output):
            typer.echo(line)


def report_lines(report: ReportRecord, output: Path) -> Iterator[str]:
    """Yield what is printed of a report: its table, the trade in one sentence, and where to look."""
    from benchmarks.bench.page import table
    from benchmarks.bench.report import PAGE_FILE, PICTURE_FILE

    yield table(report)
    yield report.headline[0].line
    yield f"report: {output / PAGE_FILE}"
    if (output / PICTURE_FILE).is_file():
        yield f"picture: {output / PICTURE_FILE}"


def compare_with(first: Path, second: Path, output: Path | None, force: bool) -> None:
    from benchmarks.bench.compare import COMPARISON, compare, text, write_comparison
    from dipgo.base.files import refuse_existing

    if output is not None:
        refuse_existing(output, force, COMPARISON)
    comparison = compare(first, second)
    typer.echo(text(comparison))
    if output is not None:
        write_comparison(comparison, output, force)
        typer.echo(f"comparison: {output / 'comparison.html'}")
