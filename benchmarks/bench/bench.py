"""The benchmark: verify, compile the baselines, time everything in turns, judge the images, write the report."""

from __future__ import annotations

import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bench.baselines import FULL, Baseline
from benchmarks.bench.candidates import Candidate, candidates_of
from benchmarks.bench.config import BenchConfig
from benchmarks.bench.headline import headlines
from benchmarks.bench.measuring import Outcome, measure_all
from benchmarks.bench.page import write_report
from benchmarks.bench.parity import TOLERANCE
from benchmarks.bench.quality import Outputs, compare, latent_error
from benchmarks.bench.reference import subnet_of
from benchmarks.bench.report import REPORT, SUBJECT, Memory, ReportRecord, Row, Usage
from benchmarks.bench.scales import quality_at_scales
from benchmarks.bench.subjects import IMAGE_SEED, PARITY_SEED, TIMING_SEED, ProgramSpec, inputs_for, latent_shape
from benchmarks.bench.techniques import EAGER, TECHNIQUES
from benchmarks.bench.timing import Spread, Timing, paired, spread, timing_of
from benchmarks.environment import clock, environment, load_average
from dipgo.base.errors import DipgoError, UsageError
from dipgo.base.files import refuse_existing
from dipgo.base.progress import Report, silent
from export.bundle import Bundle, open_bundle
from export.records.bundle import BundleRecord

AGREEMENT = {"float32": 10 * TOLERANCE}  # of exact baselines in torch with the full program
AGREEMENT_HALF = 0.1


def bench(
    folders: Path | Sequence[Path],
    output: Path,
    config: BenchConfig = BenchConfig(),
    model: str | None = None,
    force: bool = False,
    progress: Report = silent,
    baselines: Mapping[str, Baseline] | None = None,
) -> ReportRecord:
    """Measure a bundle against baselines and write the report into ``output``.

    Args:
        folders: of the bundle; further ones are measured beside it in the same rounds, against its full program.
        output: folder of the report; refused where it exists, without ``force``.
        model: where the bundle's model lies now, if not where it was compiled from.
        baselines: by name, in the place of the suite's; the first is the full program.

    Raises:
        DipgoError: a bundle that fails parity, or does not run, or a full program that does not; then nothing is
            written.
        UsageError: an output that exists, a suite that is wrong, or bundles that cannot be measured together.
    """
    folder, *beside = [folders] if isinstance(folders, Path) else folders
    settings = config.settings()
    refuse_existing(output, force, REPORT)
    load_at_start, clock_at_start = load_average(), clock()
    bundle, further = open_bundle(folder), [open_bundle(each) for each in beside]
    _check_alike(bundle, further)
    with tempfile.TemporaryDirectory(prefix="dipgo-bench-") as temporary:
        scratch = Path(temporary)
        programs = candidates_of(bundle, model, settings, baselines, scratch, progress, further)
        candidates = programs.candidates
        specs = {each.name: each.spec for each in candidates if each.spec}
        outcomes = measure_all(specs, settings, scratch, programs.plan, progress)
        judged = min(settings.scale_images, settings.images)
        own, full = specs[SUBJECT], specs[FULL]
        at_scales = []
        if not _failed(outcomes) and isinstance(own, ProgramSpec) and isinstance(full, ProgramSpec):
            at_scales = [*quality_at_scales(own, full, judged, progress)]
    if name := _failed(outcomes):
        what = "the full program" if name == FULL else "it"
        raise DipgoError(f"{folder}: {what} cannot be measured ({outcomes[name].error})")

    record = bundle.record
    inputs = inputs_for(record.conditioning, settings.images)
    rows = [_row(each, outcomes, candidates[0], inputs, record, programs.converged) for each in candidates]
    scope = f"denoising loop, batch {latent_shape(record)[0]}, {outcomes[SUBJECT].label}"
    place = environment(load_at_start, clock_at_start)
    subnet = subnet_of(bundle)
    report = ReportRecord(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=shlex.join(["dipgo", *sys.argv[1:]]),
        seeds={"parity": PARITY_SEED, "timing": TIMING_SEED, "images": IMAGE_SEED},
        model=record.model,
        sampler=record.sampler,
        search=subnet.search.describe(),
        budget=subnet.search.budget,
        cost=subnet.cost,
        scope=scope,
        rounds=len(outcomes[SUBJECT].samples["loop"]),
        images=settings.images,
        headline=headlines(record.model, record.sampler, rows, scope, place, subnet.search.seconds),
        parity=candidates[1].parity,
        rows=rows,
        scales=at_scales,
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
        search_seconds=subnet.search.seconds,
    )
    names = {number: name for name, number in record.conditioning.labels.items()}
    captions = [names.get(each, str(each)) for each in inputs]
    pictures = {name: each.outputs.images for name, each in outcomes.items() if each.outputs and not each.error}
    write_report(report, pictures, captions, output, force)
    return report


def _failed(outcomes: Mapping[str, Outcome]) -> str | None:
    """Return which of the two programs that a report is of cannot be measured, if one cannot."""
    return next((name for name in (FULL, SUBJECT) if outcomes[name].error), None)


def _check_alike(bundle: Bundle, further: Sequence[Bundle]) -> None:
    """Refuse bundles of which the first one's full program is not the reference."""
    own = bundle.record
    for each in further:
        record = each.record
        for what, mine, theirs in (
            ("model", own.model, record.model),
            ("sampler", own.sampler, record.sampler),
            ("precision", own.dtype, record.dtype),
            ("size", latent_shape(own), latent_shape(record)),
        ):
            if mine != theirs:
                raise UsageError(f"{each.folder}: of another {what} than {bundle.folder}; measure it by itself")


def _row(
    candidate: Candidate,
    outcomes: Mapping[str, Outcome],
    reference: Candidate,
    inputs: Sequence[Any],
    record: BundleRecord,
    converged: Outputs | None,
) -> Row:
    """Return a candidate's row beside the full program, ``reference``.

    ``inputs`` are the classes or prompts of the judged images, ``record`` is the bundle's.
    """
    assert reference.record
    outcome, full, full_macs = outcomes.get(candidate.name), outcomes[FULL], reference.record.macs
    agreement = _agreement(candidate, outcome, full)
    error = candidate.error or (outcome.error if outcome else "not run")
    if not error and agreement is not None and not agreement <= AGREEMENT.get(record.dtype, AGREEMENT_HALF):
        error = f"its latents are not the full program's: relative error {agreement:.1e}"
    if error or outcome is None:
        return Row(name=candidate.name, error=error)
    own = candidate.record
    macs = own.macs if own else outcome.macs
    timing = timing_of(outcome.samples["loop"], full.samples["loop"])
    quality = None
    if outcome.outputs and full.outputs:
        quality = compare(outcome.outputs, full.outputs, inputs, record.model.name, converged)
    return Row(
        name=candidate.name,
        about=candidate.about,
        curve=candidate.curve,
        runs_on=outcome.label,
        steps=(own or record).sampler.steps,
        launches=sum(len(step.launches) for step in own.steps) if own else None,
        graphs=len(own.graphs) if own else None,
        macs=macs,
        macs_ratio=macs / full_macs if macs else None,
        parity=candidate.parity,
        agreement=agreement,
        timing=timing,
        over_eager=_over_eager(candidate, outcome, outcomes.get(EAGER)),
        pipeline=_pipeline(outcome, full),
        device=spread(outcome.device_seconds) if outcome.device_seconds else None,
        outside=spread(outcome.outside) if outcome.outside else None,
        steps_seconds=_steps(outcome),
        efficiency=timing.speedup.median * macs / full_macs if macs else None,
        usage=Usage(
            build_seconds=candidate.build_seconds,
            load_seconds=float(np.median(outcome.load_seconds)),
            first_seconds=float(np.median(outcome.first_seconds)),
            resident_peak=outcome.resident,
            proportional_peak=outcome.proportional,
            device_peak=outcome.device,
            disk=_disk(candidate, record),
        ),
        quality=quality,
        skipped=outcome.skipped,
    )


def _over_eager(candidate: Candidate, outcome: Outcome, eager: Outcome | None) -> Spread | None:
    """Return how many times as fast as plain torch a technique in torch is, within rounds."""
    if candidate.record or eager is None or eager.error:
        return None
    return spread(paired(eager.samples["loop"], outcome.samples["loop"]))


def _agreement(candidate: Candidate, outcome: Outcome | None, full: Outcome) -> float | None:
    """Return the relative error to the full program of a baseline that should do the same, on the same noise."""
    technique = TECHNIQUES.get(candidate.name)
    if technique is None or not technique.exact or outcome is None or outcome.final is None or full.final is None:
        return None
    return latent_error(outcome.final, full.final)


def _pipeline(outcome: Outcome, full: Outcome) -> Timing | None:
    own, theirs = outcome.samples.get("pipeline"), full.samples.get("pipeline")
    return timing_of(own, theirs) if own and theirs and len(own) == len(theirs) else None


def _steps(outcome: Outcome) -> list[float] | None:
    runs = [run for run in outcome.steps if len(run) == len(outcome.steps[0])]
    return [float(each) for each in np.median(runs, axis=0)] if runs else None


def _disk(candidate: Candidate, record: BundleRecord) -> int:
    """Return the bytes of a bundle's files; of the model in torch those of the weights in the bundle."""
    if candidate.record:
        return sum(file.bytes for file in candidate.record.files.values())
    return sum(file.bytes for name, file in record.files.items() if Path(name).suffix == ".safetensors" and "/" in name)
