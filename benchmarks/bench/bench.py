"""The benchmark: verify, compile the baselines, time everything in turns, judge the images, write the report."""

from __future__ import annotations

import shlex
import sys
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from benchmarks.bench.baselines import FULL, Baseline, baselines_for
from benchmarks.bench.candidates import (
    Candidate,
    baseline_candidates,
    other_backends,
    parity_failure,
    subject_candidate,
    torch_candidates,
)
from benchmarks.bench.config import BenchConfig
from benchmarks.bench.environment import clock, environment, load_average
from benchmarks.bench.headlines import headlines
from benchmarks.bench.inputs import IMAGE_SEED, PARITY_SEED, TIMING_SEED, given_for, latent_shape
from benchmarks.bench.measuring import Outcome, measure_all, shown
from benchmarks.bench.page import write_report
from benchmarks.bench.progress import Bars, Progress
from benchmarks.bench.quality import Made
from benchmarks.bench.reference import converged, model_of, subnet_of, task_of
from benchmarks.bench.report import RECORD_FILE, SUBJECT, Memory, ReportRecord
from benchmarks.bench.rows import rows_of
from benchmarks.bench.specs import ProgramSpec
from benchmarks.bench.suite import Suite
from benchmarks.bench.techniques import TECHNIQUES
from dipgo.base.errors import DipgoError
from dipgo.base.files import refuse_existing
from dipgo.model.families import join
from dipgo.searching.search import describe
from dipgo.searching.task import Task
from export.bundle import Bundle, BundleRecord, open_bundle

CHUNK = 16  # images of the long trajectory at a time

__all__ = ["bench", "parity_failure"]


def bench(
    folder: Path,
    output: Path,
    config: BenchConfig = BenchConfig(),
    model: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
    baselines: Mapping[str, Baseline] | None = None,
) -> ReportRecord:
    """Measure a bundle against baselines and write the report into ``output``.

    Args:
        folder: the bundle.
        output: folder of the report; refused where it exists, without ``force``.
        config: what is measured.
        model: where the bundle's model lies now, if not where it was compiled from.
        progress: see :data:`benchmarks.bench.progress.Progress`; None shows bars.
        baselines: by name, in the place of the suite's; the first is the full program.

    Raises:
        DipgoError: a bundle that fails parity, or does not run, or a full program that does not; then nothing is
            written.
        UsageError: an output that exists, or a suite that is wrong.
    """
    settings = config.settings()
    refuse_existing(output, force, RECORD_FILE)
    load_at_start, clock_at_start = load_average(), clock()
    progress = progress or Bars()
    bundle = open_bundle(folder)
    with tempfile.TemporaryDirectory(prefix="dipgo-bench-") as temporary:
        scratch = Path(temporary)
        candidates, converged = _candidates(bundle, model, settings, baselines, scratch, progress)
        specs = {each.name: each.spec for each in candidates if each.spec}
        outcomes = measure_all(specs, settings, scratch, progress)
    for name in (FULL, SUBJECT):
        if outcomes[name].error:
            what = "the full program" if name == FULL else "it"
            raise DipgoError(f"{folder}: {what} cannot be measured ({outcomes[name].error})")

    record = bundle.record
    given = given_for(record.conditioning, settings.images)
    rows = rows_of(candidates, outcomes, given, record, converged)
    scope = scope_of(record, outcomes[SUBJECT])
    place = environment(load_at_start, clock_at_start)
    subnet = subnet_of(bundle)
    report = ReportRecord(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=shlex.join(["dipgo", *sys.argv[1:]]),
        seeds={"parity": PARITY_SEED, "timing": TIMING_SEED, "images": IMAGE_SEED},
        model=record.model,
        sampler=record.sampler,
        search=describe(subnet.search),
        budget=subnet.search.get("budget"),
        cost=subnet.cost,
        scope=scope,
        rounds=len(outcomes[SUBJECT].samples["loop"]),
        images=settings.images,
        headline=headlines(record.model, record.sampler, rows, scope, place),
        parity=candidates[1].parity,
        rows=rows,
        sites=[site.name for site in subnet.sites],
        gates=subnet.gates.astype(int).tolist(),
        memory=Memory(
            slots=sum(slot.bytes for slot in record.slots),
            naive_cache=record.naive_cache_bytes,
            files={name: file.bytes for name, file in record.files.items()},
        ),
        environment=place,
        suite=config.name,
        settings=settings,
    )
    names = {number: name for name, number in record.conditioning.labels.items()}
    captions = [names.get(each, str(each)) for each in given]
    pictures = {name: found.made.images for name, found in outcomes.items() if found.made and not found.error}
    write_report(report, pictures, captions, output, force)
    return report


def scope_of(record: BundleRecord, outcome: Outcome) -> str:
    """Return what the wall times span, in words."""
    return f"denoising loop, batch {latent_shape(record)[0]}, {outcome.label}"


def _candidates(
    bundle: Bundle,
    model: str | None,
    suite: Suite,
    baselines: Mapping[str, Baseline] | None,
    scratch: Path,
    progress: Progress,
) -> tuple[list[Candidate], Made | None]:
    """Return the full program, the bundle and the baselines, and what the long trajectory makes where it is wanted.

    The model in torch is let go of when this returns: it takes no part in the timing.
    """
    found = model_of(bundle, model)
    task = task_of(bundle, found, progress)
    own = subject_candidate(bundle, SUBJECT, task, suite, scratch, progress)
    assert isinstance(own.spec, ProgramSpec)
    searched = subnet_of(bundle)
    chosen = baselines or baselines_for(suite.baselines, suite.subnets, searched)
    techniques = [] if baselines else [name for name in suite.baselines if name in TECHNIQUES]
    full, *others = baseline_candidates(task, searched.cost.ratio, chosen, own.spec, bundle.record, scratch, progress)
    if full.error:
        raise DipgoError(f"{bundle.folder}: the full program cannot be measured ({full.error})")
    further = other_backends([full, own], suite, task, progress)
    in_torch = torch_candidates(techniques, bundle, model, suite.threads or own_threads(own))
    count = min(suite.converged_images, suite.images)
    converged = _converged(task, bundle, count, suite, progress) if count else None
    return [full, own, *others, *further, *in_torch], converged


def own_threads(candidate: Candidate) -> int | None:
    """Return how many threads a small program takes by itself, so that torch gets as many; None is its own choice."""
    from engines.pipeline.pipeline import load

    assert isinstance(candidate.spec, ProgramSpec)
    program = load(candidate.spec.folder, None, candidate.spec.backend)
    return getattr(program.runner, "threads", None)


def _converged(task: Task, bundle: Bundle, count: int, suite: Suite, progress: Progress) -> Made:
    """Run many steps of DDIM on the first of the judged noise, in torch."""
    steps = suite.converged_steps
    long = converged(task, steps)
    given = given_for(bundle.record.conditioning, suite.images)
    shape = [suite.images, *latent_shape(bundle.record)[1:]]
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(IMAGE_SEED))
    latents, images = [], []
    for start in range(0, count, CHUNK):
        progress(f"{steps} steps", start, count, "")
        end = min(start + CHUNK, count)
        with torch.no_grad():
            conditions = join(*task.model.family.conditions(task.pipe, given[start:end]), task.guidance_scale > 1)
            latents.append(long.trajectory.full(noise[start:end], conditions)[-1])
            if bundle.record.decoder is not None:
                images.append((task.decode(latents[-1]) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1))
    progress(f"{steps} steps", count, count, "")
    found = np.concatenate(latents)
    return Made(found, np.concatenate(images) if images else shown(found))
