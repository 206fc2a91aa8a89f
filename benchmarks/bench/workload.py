"""A workload's programs, with random weights: compiled once, and measured in one process against eager diffusers.

``dipgo bench`` gives each program a process of its own, so that memory and load times are its own too. Where a GPU is
lent for minutes there is no time for that: here programs share the drawn weights, and each is timed beside the eager
model alone, in turns.
"""

from __future__ import annotations

import gc
import json
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from benchmarks.bench import baselines
from benchmarks.bench.baselines import FULL, Compiler, Share
from benchmarks.bench.parity import TOLERANCE, Parity, measure
from benchmarks.bench.quality import latent_error
from benchmarks.bench.reference import cast_pipeline, conditions_as_arrays
from benchmarks.bench.subjects import PARITY_SEED, ProgramSpec, ProgramSubject, Subject, TorchSpec, inputs_for, save
from benchmarks.bench.suite import Workload
from benchmarks.bench.timing import Timing, in_rounds, timing_of
from benchmarks.bench.torch_subject import TorchSubject
from benchmarks.failures import NotMeasuredError, one_line
from dipgo.base.dtypes import PRECISIONS
from dipgo.base.errors import DipgoError, DipgoWarning
from dipgo.base.records import Record, read_json
from dipgo.graph.trace import trace
from dipgo.model.models import find_model
from dipgo.schedule.fixed_schedules import EXTRAPOLATION, Rule, spaced
from dipgo.schedule.subnet import SubNet, load_subnet
from dipgo.searching.backup_fit import Backups
from dipgo.searching.task import Task, make_task
from engines.torchrt.runner import default_device
from export.bundle import Bundle, open_bundle

ROOT = Path(__file__).parents[2]
MAIN, FEWER, LEARNED = "SubNet", "fewer steps", "learned backups"
EAGER, COMPILED = "eager torch", "torch.compile"
INDEX = "programs.json"  # beside the bundles, written last
AGREEMENT = 0.1  # relative, of torch.compile with the eager model in half precision


class Row(Record):
    """A program as it was measured; ``timing`` is paired with the eager model's.

    Attributes:
        backend: of the program; ``diffusers`` for the model in torch.
        macs_ratio: of the full trajectory's.
        launches: of one trajectory; 1 is one CUDA graph of all steps.
        agreement: relative error to the eager model's latents, of what should do the same.
        build_seconds: of engines that are built beforehand.
        device_peak: bytes that torch reserved at most, in this process so far; None without a GPU.
        warnings: what was said while it was loaded and run.
    """

    program: str
    backend: str
    runs_on: str = ""
    steps: int | None = None
    macs_ratio: float | None = None
    launches: int | None = None
    parity: Parity | None = None
    agreement: float | None = None
    timing: Timing | None = None
    build_seconds: float | None = None
    load_seconds: float | None = None
    first_seconds: float | None = None
    device_peak: int | None = None
    warnings: list[str] = Field(default_factory=list)
    error: str | None = None

    def line(self) -> str:
        """Return the row as one line of text."""
        if self.error or not self.timing:
            return f"{self.program}, {self.backend}: {self.error or 'not timed'}"
        wall, speed = self.timing.wall.median, self.timing.speedup
        parts = [f"{wall * 1e3:.1f} ms"]
        parts += [f"{self.launches} launch{'es' * (self.launches != 1)}"] if self.launches else []
        parts += [f"{speed.median:.2f} times as fast as eager ({speed.p5:.2f} to {speed.p95:.2f})"]
        parts += [self.parity.line()] if self.parity else []
        return f"{self.program}, {self.backend}: {'; '.join(parts)}"


def compile_programs(workload: Workload, folder: Path) -> dict[str, Path]:
    """Compile the programs of a workload into ``folder``, once; returns their bundles, the denoiser alone in each.

    The full program is first. One that cannot be compiled is left out.

    Raises:
        DipgoError: the full program cannot be compiled.
    """
    index = folder / INDEX
    if not index.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        task = _task(workload)
        main = _main(task, workload)
        programs = {
            FULL: baselines.full,
            MAIN: lambda task, share: (task, main),
            FEWER: baselines.fewer_steps,
            LEARNED: _learned,
        }
        compiler, share = Compiler(task, folder, workload.batch, whole=False), Share(main.cost.ratio, main.cost.ratio)
        made = [compiler.compile(name, build, share) for name, build in programs.items()]
        if made[0].error:
            raise DipgoError(f"{workload.model}: the full program cannot be compiled ({made[0].error})")
        index.write_text(json.dumps({each.name: each.folder.name for each in made if each.folder}))
    names: dict[str, str] = read_json(index, "list of programs")
    return {name: folder / where for name, where in names.items()}


def _task(workload: Workload) -> Task:
    model = find_model(workload.model, random_weights=True)
    guidance = model.default_guidance
    traced = trace(model, workload.sites, guidance, PRECISIONS[workload.dtype].torch)
    return make_task(model, workload.steps, workload.sampler, traced, guidance)


def _main(task: Task, workload: Workload) -> SubNet:
    """Return the gates of the workload's SubNet on the task's own model, or whole steps at even intervals.

    Raises:
        DipgoError: the SubNet has other sites or another number of steps.
    """
    if workload.subnet is None:
        return baselines.uniform_reuse(task, Share(workload.share, workload.share))[1]
    subnet = load_subnet(ROOT / workload.subnet)
    names = [site.name for site in task.trace.sites]
    if [site.name for site in subnet.sites] != names or subnet.calls != task.sampler.calls:
        raise DipgoError(f"{workload.subnet}: for other sites or steps than those of {workload.model}")
    return task.subnet(subnet.schedule.canonical(task.trace), method=Path(workload.subnet).stem)


def _learned(task: Task, share: Share) -> tuple[Task, SubNet]:
    """Whole steps at even intervals, and backups of the shape that a search learns: by channel and pass of guidance."""
    start = spaced(task.trace.macs, task.sampler.calls, share.macs, Rule(history=EXTRAPOLATION))
    return task, task.subnet(Backups(task.trace, start).schedule().canonical(task.trace), method=LEARNED)


def measure_programs(
    workload: Workload,
    programs: Mapping[str, Path],
    backend: str,
    repeats: int,
    scratch: Path,
    names: Sequence[str] | None = None,
) -> Iterator[Row]:
    """Yield the eager model's row, then one for each program in a backend, as soon as it is measured.

    ``names`` are those of the programs, in order; None is all. With ``torch-compile`` the whole model under
    ``torch.compile`` comes last.

    Raises:
        DipgoError: the model does not run.
    """
    full = open_bundle(programs[FULL])
    pipe = find_model(workload.model, random_weights=True).pipeline().to(default_device())
    pairs = _Pairs(full, pipe, repeats)
    yield pairs.row(EAGER, "diffusers", partial(pairs.timed, pairs.eager))
    conditions = _conditions(full, pipe, workload.batch, scratch / "conditions.npz")
    for name in programs if names is None else names:
        spec = ProgramSpec(folder=str(programs[name]), backend=backend, conditions=conditions)
        yield pairs.row(name, backend, partial(pairs.program, spec))
    if backend == "torch-compile":
        yield pairs.row(COMPILED, "diffusers", pairs.technique)


def _conditions(bundle: Bundle, pipe: Any, batch: int, path: Path) -> list[str]:
    """Write what programs without a text encoder take in the place of prompts; returns the file, if there is one."""
    conditioning = bundle.record.conditioning
    if conditioning.kind != "prompt":
        return []
    save(path, conditions_as_arrays(pipe, inputs_for(conditioning, batch), bundle.record))
    return [str(path)]


class _Pairs:
    """Measures subjects beside the eager model, one after another; each takes a dict of figures and adds its own."""

    def __init__(self, full: Bundle, pipe: Any, repeats: int) -> None:
        self._full, self._pipe, self._repeats = full, pipe, repeats
        self.eager = TorchSubject(self._spec(EAGER), pipe)
        self._latents = self.eager.loop()

    def row(self, program: str, backend: str, measure: Callable[[dict[str, Any]], None]) -> Row:
        """Return a row with what ``measure`` found; where it fails, with the error and what was found before it."""
        figures: dict[str, Any] = {"program": program, "backend": backend}
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", DipgoWarning)
            try:
                measure(figures)
            except Exception as error:  # a program may fail in any way; the others go on
                figures["error"] = one_line(error, 300)
        gc.collect()  # engines and graphs of the one before
        lines = [" ".join(str(each.message).split()) for each in said if issubclass(each.category, DipgoWarning)]
        peak = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else None
        return Row(**figures, warnings=lines, device_peak=peak)

    def program(self, spec: ProgramSpec, figures: dict[str, Any]) -> None:
        """Build what has to be built, load the program, measure its parity, and time it if that holds."""
        bundle = open_bundle(Path(spec.folder))
        if spec.backend == "tensorrt":
            from engines.trt.build import build

            figures["build_seconds"] = _seconds(lambda: build(bundle))
        figures |= {"steps": bundle.record.sampler.steps, "macs_ratio": bundle.record.macs / self._full.record.macs}
        begin = time.perf_counter()
        subject = ProgramSubject(spec)
        figures |= {"load_seconds": time.perf_counter() - begin, "runs_on": subject.label}
        try:
            figures["first_seconds"] = _seconds(subject.loop)
            figures["parity"] = parity = measure(subject.program, self._pipe, subject.batch, PARITY_SEED)
            if not parity.passed:
                raise NotMeasuredError(f"parity failed, {parity.line()}")
            before = subject.program.contexts.launches
            subject.loop()
            figures["launches"] = subject.program.contexts.launches - before
            self.timed(subject, figures)
        finally:
            subject.close()

    def technique(self, figures: dict[str, Any]) -> None:
        """Time the whole model under ``torch.compile``."""
        own = cast_pipeline(self._pipe, getattr(torch, self._full.record.dtype))
        subject = TorchSubject(self._spec(COMPILED), own)
        figures["first_seconds"] = _seconds(subject.loop)
        figures["agreement"] = error = latent_error(subject.loop(), self._latents)
        if not error <= (10 * TOLERANCE if self._full.record.dtype == "float32" else AGREEMENT):
            raise NotMeasuredError(f"its latents are not the eager model's: relative error {error:.1e}")
        self.timed(subject, figures)

    def timed(self, subject: Subject, figures: dict[str, Any]) -> None:
        """Time a subject and the eager model in turns."""
        own = figures["program"]
        subjects = {EAGER: self.eager, own: subject}
        samples: dict[str, list[float]] = {name: [] for name in subjects}
        figures["runs_on"] = subject.label

        def sample(name: str) -> None:
            samples[name].append(_seconds(subjects[name].loop))

        in_rounds(lambda: list(subjects), sample, self._repeats, seconds=0)
        figures["timing"] = timing_of(samples[own], samples[EAGER])

    def _spec(self, technique: str) -> TorchSpec:
        return TorchSpec(bundle=str(self._full.folder), technique=technique)


def _seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin
