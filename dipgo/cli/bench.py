"""Whether a bundle is right, and how fast it is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import Field

from benchmarks.bench.config import BenchConfig
from dipgo.base.config import Backend, Config
from dipgo.base.errors import DipgoError, UsageError
from dipgo.cli.options import BundleArgument, ForceOption, SourceOption

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


def verify(bundle: BundleArgument, config: VerifyConfig, model: SourceOption = None) -> None:
    """Measure the parity of a bundle with the gated diffusers pipeline; fail if it does not hold."""
    typer.echo(config.line(bundle, model))


def bench(
    config: BenchConfig,
    bundles: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="BUNDLE...",
            help="Folder written by 'dipgo export'; further ones of the same model and sampler are set beside it.",
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
    """Verify bundles, measure them against baselines, and write a report; or compare two reports."""
    if compare is not None:
        if bundles or config.model_fields_set:
            raise UsageError("--compare takes two reports and measures nothing; leave BUNDLE and --suite out")
        compare_with(*compare, output, force)
        return
    if not bundles or output is None:
        raise UsageError("give a BUNDLE and -o REPORT, or --compare A B; see 'dipgo bench --help'")
    from dipgo import api

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
