"""The benchmark: verify, compile the baselines, time everything interleaved, judge the images, write the report."""

from __future__ import annotations

import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np

import engines
from benchmarks.baselines import BASELINES, FULL, Baseline, Compiled, compile_baselines, one_line
from benchmarks.environment import environment, load_average
from benchmarks.page import macs, write_report
from benchmarks.parity import Parity, given_of, measure
from benchmarks.progress import Bars, Progress
from benchmarks.quality import SEED, compare, generate
from benchmarks.reference import model_of, subnet_of, task_of
from benchmarks.report import SUBJECT, Memory, ReportRecord, Row, decibels, headlines, milliseconds
from benchmarks.timing import Timing, time_interleaved
from dipgo.errors import DipgoError, UsageError
from dipgo.files import refuse_existing
from dipgo.search.search import describe
from dipgo.search.task import Task
from engines import Program

PARITY_SEED = 0
TIMING_SEED = 1


@dataclass(frozen=True)
class Entry:
    """A program that is to be measured, or why it cannot be."""

    name: str
    program: Program | None = None
    parity: Parity | None = None
    error: str | None = None


def bench(
    folder: Path,
    output: Path,
    model: str | None = None,
    images: int = 64,
    repeats: int = 10,
    seconds: float = 10.0,
    threads: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
    baselines: Mapping[str, Baseline] = BASELINES,
) -> ReportRecord:
    """Measure a bundle against baselines at equal compute and write the report into ``output``.

    Args:
        folder: the bundle.
        output: folder of the report; refused where it exists, without ``force``.
        model: where the bundle's model lies now, if not where it was compiled from.
        images: that quality is judged on.
        repeats, seconds: the timing takes at least this many rounds and this long.
        threads: of ONNX Runtime; None leaves the choice to it.
        progress: see :data:`benchmarks.progress.Progress`; None shows bars.
        baselines: by name; the first is the full program.

    Raises:
        DipgoError: a program that fails parity, or does not run; then nothing is written.
        UsageError: an output that exists, or too few images.
    """
    if images < 8:
        raise UsageError(f"images = {images}: too few to judge by; give at least 8")
    refuse_existing(output, force)
    load_at_start = load_average()
    progress = progress or Bars()
    with ExitStack() as stack:
        program = stack.enter_context(engines.load(folder, threads))
        task = task_of(program.bundle, model_of(program.bundle, model), progress)
        parity = measure(program, task.pipe, seed=PARITY_SEED, progress=progress)
        if not parity.passed:
            raise DipgoError(f"{folder}: {parity_failure(parity)}; nothing was measured, export it again")
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dipgo-bench-")))
        subnet = subnet_of(program.bundle)
        compiled = compile_baselines(task, subnet.cost.ratio, scratch, baselines, progress, program.batch)
        full, *others = _open(stack, compiled, task, threads, progress)
        if full.program is None:
            raise DipgoError(f"{folder}: the full program cannot be measured ({full.error})")
        entries = [full, Entry(SUBJECT, program, parity), *others]
        running = {entry.name: entry.program for entry in entries if entry.program}
        loops = {name: partial(each.denoise, *_inputs(each)) for name, each in running.items()}
        timings = time_interleaved(loops, repeats, seconds, progress=progress)
        pictures = {name: generate(each, images, name, progress) for name, each in running.items()}

    rows = [_row(entry, timings, pictures, full.program.record.macs) for entry in entries]
    scope = scope_of(program)
    place = environment(load_at_start)
    record = program.record
    report = ReportRecord(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        seeds={"parity": PARITY_SEED, "timing": TIMING_SEED, "images": SEED},
        model=record.model,
        sampler=record.sampler,
        search=describe(subnet.search),
        budget=subnet.search.get("budget"),
        cost=subnet.cost,
        scope=scope,
        rounds=len(timings[SUBJECT].samples),
        images=images,
        headline=headlines(record.model, record.sampler, rows, scope, place),
        parity=parity,
        rows=rows,
        sites=[site.name for site in subnet.sites],
        gates=subnet.gates.astype(int).tolist(),
        memory=Memory(
            slots=sum(slot.bytes for slot in record.slots),
            naive_cache=record.naive_cache_bytes,
            files={name: file.bytes for name, file in record.files.items()},
        ),
        environment=place,
    )
    names = {number: name for name, number in record.conditioning.labels.items()}
    captions = [names.get(each, str(each)) for each in given_of(program, images)]
    write_report(report, pictures[FULL], pictures[SUBJECT], captions, output, force)
    return report


def table(report: ReportRecord) -> str:
    """Return the report as a short text table: a line a program, then parity."""
    lines = [("program", "MACs", "wall time", "speedup", "PSNR", "class accuracy")]
    for row in report.rows:
        if row.timing is None or row.quality is None or row.macs is None:
            lines.append((row.name, f"not measured: {row.error}", "", "", "", ""))
            continue
        accuracy = row.quality.class_accuracy
        lines.append(
            (
                row.name,
                macs(row.macs),
                milliseconds(row.timing.wall.median),
                f"{row.timing.speedup.median:.2f}",
                "reference" if row is report.rows[0] else decibels(row.quality.psnr_db),
                "not judged" if accuracy is None else f"{accuracy:.1%}",
            )
        )
    whole = [line for line in lines if line[2]]
    widths = [max(len(line[column]) for line in whole) for column in range(6)]
    widths[0] = max(len(line[0]) for line in lines)
    text = [
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        if line[2]
        else f"{line[0].ljust(widths[0])}  {line[1]}"
        for line in lines
    ]
    return "\n".join([*text, f"parity: {report.parity.line()}; wall time: {report.scope}"])


def parity_failure(parity: Parity) -> str:
    """Return what is wrong with a parity that did not hold."""
    return f"parity failed, {parity.line()}"


def scope_of(program: Program) -> str:
    """Return what the wall times span, in words."""
    return f"denoising loop, batch {program.batch}, {program.runner.label}"


def _open(
    stack: ExitStack, compiled: Sequence[Compiled], task: Task, threads: int | None, progress: Progress
) -> list[Entry]:
    """Load the baselines' programs and verify each; one that fails is listed with its error."""
    entries = []
    for number, baseline in enumerate(compiled):
        progress("verify baselines", number, len(compiled), baseline.name)
        if baseline.folder is None:
            entries.append(Entry(baseline.name, error=baseline.error))
            continue
        try:
            program = stack.enter_context(engines.load(baseline.folder, threads))
            parity = measure(program, task.pipe, images=1, seed=PARITY_SEED)
        except Exception as error:  # a baseline may fail in any way; the others go on
            entries.append(Entry(baseline.name, error=one_line(error)))
            continue
        entries.append(
            Entry(baseline.name, program, parity)
            if parity.passed
            else Entry(baseline.name, error=parity_failure(parity))
        )
    progress("verify baselines", len(compiled), len(compiled), "")
    return entries


def _inputs(program: Program) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return noise and conditions of one batch."""
    return program.noise(program.batch, TIMING_SEED), program.conditions(given_of(program, program.batch))


def _row(entry: Entry, timings: Mapping[str, Timing], pictures: Mapping[str, np.ndarray], full_macs: int) -> Row:
    if entry.program is None:
        return Row(name=entry.name, error=entry.error)
    record, timing = entry.program.record, timings[entry.name]
    classes = given_of(entry.program, len(pictures[entry.name]))
    ratio = record.macs / full_macs
    return Row(
        name=entry.name,
        steps=record.sampler.steps,
        launches=sum(len(step.launches) for step in record.steps),
        graphs=len(record.graphs),
        macs=record.macs,
        macs_ratio=ratio,
        parity=entry.parity,
        timing=timing,
        efficiency=timing.speedup.median * ratio,
        quality=compare(pictures[entry.name], pictures[FULL], classes, record.model.name),
    )
