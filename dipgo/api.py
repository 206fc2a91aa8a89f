"""What ``import dipgo`` gives beside bundles at work; with the command line, which calls it, the roof of all packages.

Options are those of the command line, as keywords (``steps=20``) or as a config. Progress is shown in a terminal;
``progress`` shows it anywhere (True) or nowhere (False).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from benchmarks.bench.config import BenchConfig, JudgeConfig
from dipgo.base.config import Config, checked
from dipgo.base.errors import UsageError
from dipgo.base.files import refuse_existing, refuse_to_fill
from dipgo.base.guidance import guidance_of
from dipgo.base.pixels import pixels_of
from dipgo.base.progress import Progress, is_main, silent
from dipgo.searching.config import SearchConfig
from export.config import ExportConfig

if TYPE_CHECKING:
    from benchmarks.bench.judgement import Judgement
    from benchmarks.bench.parity import Parity
    from benchmarks.bench.report import ReportRecord
    from dipgo.graph.latency import LatencyProfile
    from dipgo.model.models import Model
    from dipgo.schedule.subnet import SubNet
    from export.records.bundle import BundleRecord

C = TypeVar("C", bound=Config)
Rest = Callable[[float], float]


def nothing_more(image: float) -> float:
    """Return the seconds of what comes after a search where nothing does."""
    return 0.0


def search(
    model: str | Model, config: SearchConfig | None = None, *, progress: bool | None = None, **options: Any
) -> SubNet:
    """Search a SubNet of a model.

    Args:
        model: a built-in name, a diffusers folder or a hub id, or what ``dipgo.find_model`` returned.
        config: the options, or as keywords: see :class:`dipgo.searching.config.SearchConfig`; ``steps`` and ``budget``
            are needed.

    Raises:
        UsageError, DipgoError: in one line, what is wrong and what to do.
    """
    chosen = _options(SearchConfig, config, options)
    if chosen.several:
        raise UsageError("give one budget; 'dipgo search' takes several")
    return next(subnets(model, chosen, Progress(progress)))


def export(
    subnet: SubNet | str | Path | Sequence[SubNet | str | Path],
    output: str | Path,
    config: ExportConfig | None = None,
    *,
    model: str | Model | None = None,
    force: bool = False,
    progress: bool | None = None,
    **options: Any,
) -> BundleRecord:
    """Compile a SubNet, or the file of one, into a bundle: the folder ``output``.

    Several become several programs, which requests choose by steps and budget; the first is what they get by default.

    Args:
        config: the options, or as keywords: see :class:`export.config.ExportConfig`.
        model: where the model lies now, if not where it was searched.

    Raises:
        UsageError, DipgoError: in one line, what is wrong and what to do.
    """
    from dipgo.schedule.subnet import load_subnet
    from export.bundle import BUNDLE

    chosen = _options(ExportConfig, config, options)
    if chosen.weights == "copy":
        refuse_existing(Path(output), force, BUNDLE)
    given = [subnet] if isinstance(subnet, str | Path) or not isinstance(subnet, Sequence) else subnet
    subnets = [load_subnet(Path(each)) if isinstance(each, str | Path) else each for each in given]
    source = _model_of(model or subnets[0].model.name, subnets[0].sampler.pixels)
    with Progress(progress).spinner("export"):
        from export.compiler import compile_subnet

        return compile_subnet(subnets, source, output, chosen, force)


def verify(
    bundle: str | Path,
    *,
    model: str | None = None,
    images: int = 2,
    backend: str = "onnxruntime",
    guidance: float | None = None,
    progress: bool | None = None,
) -> Parity:
    """Measure the parity of a bundle with the gated diffusers pipeline; ``passed`` of what it returns says whether.

    ``guidance`` is a scale; None is each SubNet's own.
    """
    from benchmarks.bench.parity import verify as measure

    with Progress(progress).phases() as report:
        return measure(Path(bundle), model, images, progress=report, backend=backend, guidance=guidance)


def debug(
    bundle: str | Path,
    output: str | Path,
    parity: Parity | None = None,
    *,
    model: str | None = None,
    backend: str = "onnxruntime",
    progress: bool | None = None,
) -> str:
    """Write into the folder ``output`` where a bundle's program diverges, and return one line on it.

    Launches are held against ONNX Runtime and the gated model in torch, within the tolerance of ``parity``, which is
    measured if it is not given.
    """
    from benchmarks.debug.debug import check_debug
    from benchmarks.debug.debug import debug as find

    check_debug(Path(output), Path(bundle))
    parity = parity or verify(bundle, model=model, backend=backend, progress=progress)
    with Progress(progress).phases() as report:
        return find(Path(bundle), Path(output), parity.tolerance, model, backend, report)


def bench(
    bundle: str | Path | Sequence[str | Path],
    output: str | Path,
    config: BenchConfig | None = None,
    *,
    model: str | None = None,
    force: bool = False,
    progress: bool | None = None,
    **options: Any,
) -> ReportRecord:
    """Verify a bundle, measure it against baselines, and write a report: the folder ``output``.

    Args:
        bundle: or several of one model and sampler, measured in the same rounds; baselines are at the first one's MACs.
        config: the options, or as keywords: see :class:`benchmarks.bench.config.BenchConfig`.
        model: where the model lies now, if not where the bundle was compiled from.
    """
    from benchmarks.bench.bench import bench as measure

    chosen = _options(BenchConfig, config, options)
    with Progress(progress).phases() as report:
        folders = [Path(each) for each in ([bundle] if isinstance(bundle, str | Path) else bundle)]
        return measure(folders, Path(output), chosen, model, force, report)


def judge(
    subnets: Sequence[SubNet | str | Path],
    config: JudgeConfig | None = None,
    *,
    model: str | Model | None = None,
    progress: bool | None = None,
    **options: Any,
) -> Judgement:
    """Judge SubNets, or the files of some, in torch: how close each comes to the full trajectory's images.

    Args:
        subnets: of one model and sampler; files are called by their paths in what is returned, others by number.
        config: the options, or as keywords: see :class:`benchmarks.bench.config.JudgeConfig`.
        model: where the model lies now, if not where it was searched.

    Raises:
        UsageError, DipgoError: in one line, what is wrong and what to do.
    """
    from benchmarks.bench.judgement import judge as measure
    from dipgo.schedule.subnet import load_subnet

    chosen = _options(JudgeConfig, config, options)
    named: dict[str, SubNet] = {}
    for number, each in enumerate(subnets, 1):
        if isinstance(each, str | Path):
            named[str(each)] = load_subnet(Path(each))
        else:
            named[f"SubNet {number}"] = each
    if not named or len(named) < len(subnets):
        raise UsageError("give SubNets to judge, each once")
    source = _model_of(model or next(iter(named.values())).model.name)
    with Progress(progress).phases() as report:
        return measure(named, source, chosen, report)


def compile(
    model: str | Model,
    output: str | Path,
    config: SearchConfig | None = None,
    *,
    export_config: ExportConfig | None = None,
    bench_config: BenchConfig | None = None,
    force: bool = False,
    progress: bool | None = None,
    **options: Any,
) -> Path:
    """Search and export: ``output/subnet.json``, ``output/bundle``, and with ``bench_config`` ``output/report``.

    Args:
        config: the options of the search, or as keywords: see :class:`dipgo.searching.config.SearchConfig`.

    Returns:
        The bundle's folder.
    """
    from benchmarks.bench.report import REPORT
    from export.bundle import BUNDLE

    chosen, output = _options(SearchConfig, config, options), Path(output)
    if chosen.several:
        raise UsageError("give one budget to compile; 'dipgo search' takes several")
    bundle, report = output / "bundle", output / "report"
    refuse_to_fill(output, force or chosen.resume)
    refuse_existing(bundle, force, BUNDLE)
    if bench_config:
        refuse_existing(report, force, REPORT)
    ((_, subnet),) = search_into(output / "subnet.json", model, chosen, force, Progress(progress))
    export(subnet, bundle, export_config, model=model, force=force, progress=progress)
    if bench_config:
        place = model if isinstance(model, str) else str(model.folder)
        bench(bundle, report, bench_config, model=place, force=force, progress=progress)
    return bundle


def search_into(
    path: Path, model: str | Model, config: SearchConfig, force: bool, show: Progress, rest: Rest = nothing_more
) -> list[tuple[Path, SubNet]]:
    """Search and write each SubNet as it is found; see :mod:`dipgo.searching.outputs`.

    ``rest`` tells the seconds of what comes after the search, from those of an image of the full model, for the total
    that is shown.

    Returns:
        The SubNets and their files, one a budget; nothing in other processes than the main one.
    """
    from dipgo.searching.outputs import Outputs
    from dipgo.searching.pareto import write_pareto

    outputs = Outputs(path, config, force)
    outputs.check()
    written = [(outputs.save(subnet), subnet) for subnet in subnets(model, config, show, rest) if is_main()]
    if written and config.several:
        write_pareto([subnet for _, subnet in written], path)
    return written


def subnets(model: str | Model, config: SearchConfig, show: Progress, rest: Rest = nothing_more) -> Iterator[SubNet]:
    """Yield the SubNet of each budget, the largest first, as they are found."""
    import torch

    from benchmarks.latency import measure_latency
    from dipgo.graph.latency import check_profile, read_profile
    from dipgo.schedule.subnet import load_subnet
    from dipgo.searching.distributed import processes
    from dipgo.searching.forecast import forecast
    from dipgo.searching.run_folder import begun_with
    from dipgo.searching.search import sweep
    from dipgo.searching.task import Choices, make_task

    profile = None if config.cost in ("macs", "latency") else read_profile(Path(config.cost))
    starts = [load_subnet(file) for file in config.start]
    source = _model_of(model, pixels_of(config.size))
    with show.spinner("load and trace"):
        if config.threads:
            torch.set_num_threads(config.threads)
        task = make_task(
            source,
            config.steps,
            config.sampler,
            config.sites,
            guidance_of(config.guidance, config.guidance_rescale),
            device=config.device,
            choices=Choices(config.prompts, config.classes),
        )

    def measured() -> LatencyProfile:
        folder = config.run_folder
        begun = begun_with(folder, "profile") if config.resume and folder else None
        if begun and folder:  # measured again it would not be the same
            return check_profile(begun, folder / "run.json")
        return measure_latency(task, threads=config.threads)

    if config.cost == "latency":
        with show.spinner("measure latency"):
            profile = processes(task.trajectory.device).from_main(measured)
    with show.phases() as report:
        found = sweep(task, config, report, profile, starts)
        if report is not silent and not config.resume:
            expected = forecast(task, config)
            report("the search", 0, 0, expected.line(rest(expected.image)))
        yield from found


def _options(kind: type[C], config: C | None, options: dict[str, Any]) -> C:
    return checked(kind, options) if config is None else config.changed(**options) if options else config


def _model_of(model: str | Model, pixels: tuple[int, int] | None = None) -> Model:
    from dipgo.model.models import find_model

    if isinstance(model, str):
        return find_model(model, pixels=pixels)
    return model.at(model.default_guidance, pixels) if pixels else model
