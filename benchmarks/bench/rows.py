"""The rows of a report, from what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bench.baselines import FULL
from benchmarks.bench.candidates import Candidate
from benchmarks.bench.measuring import Outcome
from benchmarks.bench.parity import TOLERANCE
from benchmarks.bench.quality import Made, compare, latent_error
from benchmarks.bench.report import Row, Usage
from benchmarks.bench.techniques import TECHNIQUES
from benchmarks.bench.timing import Timing, spread, timing_of
from export.bundle import BundleRecord

AGREEMENT = {"float32": 10 * TOLERANCE}  # of exact baselines in torch with the full program
AGREEMENT_HALF = 0.1


def rows_of(
    candidates: Sequence[Candidate],
    outcomes: Mapping[str, Outcome],
    given: Sequence[Any],
    record: BundleRecord,
    converged: Made | None,
) -> list[Row]:
    """Return a row a candidate, in order: the full program, the bundle, the others.

    ``given`` are the classes or prompts of the judged images, ``record`` is the bundle's.
    """
    full = candidates[0]
    assert full.record
    return [
        _row(each, outcomes.get(each.name), outcomes[FULL], full.record.macs, given, record, converged)
        for each in candidates
    ]


def _row(
    candidate: Candidate,
    outcome: Outcome | None,
    full: Outcome,
    full_macs: int,
    given: Sequence[Any],
    record: BundleRecord,
    converged: Made | None,
) -> Row:
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
    if outcome.made and full.made:
        quality = compare(outcome.made, full.made, given, record.model.name, converged)
    return Row(
        name=candidate.name,
        runs_on=outcome.label,
        steps=(own or record).sampler.steps,
        launches=sum(len(step.launches) for step in own.steps) if own else None,
        graphs=len(own.graphs) if own else None,
        macs=macs,
        macs_ratio=macs / full_macs if macs else None,
        parity=candidate.parity,
        agreement=agreement,
        timing=timing,
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
