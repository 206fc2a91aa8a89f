"""What a benchmark measures: the bundle, the full program, the baselines; compiled, verified, ready to be timed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.bench.baselines import Baseline, baselines_for, compile_baselines
from benchmarks.bench.parity import Parity, measure
from benchmarks.bench.quality import Outputs
from benchmarks.bench.reference import conditions_as_arrays, made_by_many_steps, model_of, subnet_of, task_of
from benchmarks.bench.report import SUBJECT
from benchmarks.bench.subjects import PARITY_SEED, ProgramSpec, TorchSpec, encodes, inputs_of, latent_shape, save
from benchmarks.bench.suite import Suite
from benchmarks.bench.techniques import TECHNIQUES
from benchmarks.failures import one_line
from dipgo.base.errors import DipgoError
from dipgo.base.progress import Report
from dipgo.searching.task import Task
from engines.pipeline.pipeline import load
from engines.program import Program
from export.bundle import Bundle, BundleRecord


@dataclass(frozen=True)
class Candidate:
    """A program that is to be measured, or why it cannot be; ``record`` is None for the model in torch."""

    name: str
    spec: ProgramSpec | TorchSpec | None = None
    record: BundleRecord | None = None
    parity: Parity | None = None
    build_seconds: float | None = None
    error: str | None = None


def parity_failure(parity: Parity) -> str:
    """Return what is wrong with a parity that did not hold."""
    return f"parity failed, {parity.line()}"


def candidates_of(
    bundle: Bundle,
    model: str | None,
    suite: Suite,
    baselines: Mapping[str, Baseline] | None,
    scratch: Path,
    progress: Report,
) -> tuple[list[Candidate], Outputs | None]:
    """Return the full program, the bundle and the baselines, and what the long trajectory makes where it is wanted.

    The model in torch is let go of when this returns: it takes no part in the timing.

    Raises:
        DipgoError: the bundle or the full program does not run, or the bundle's parity does not hold.
    """
    task = task_of(bundle, model_of(bundle, model), progress)
    spec = ProgramSpec(folder=str(bundle.folder), backend=suite.backends[0], threads=suite.threads)
    with load(bundle.folder, suite.threads, suite.backends[0]) as program:
        parity = measure(program, task.pipe, suite.parity_images, PARITY_SEED, progress)
        if not parity.passed:
            raise DipgoError(f"{bundle.folder}: {parity_failure(parity)}; nothing was measured, export it again")
        spec = spec.model_copy(update={"conditions": write_conditions(program, task.pipe, suite.images, scratch)})
        # What a small program takes by itself, so that torch gets as many; None is its own choice.
        threads = suite.threads or getattr(program.runner, "threads", None)
    own, searched = Candidate(SUBJECT, spec, bundle.record, parity), subnet_of(bundle)
    chosen = baselines or baselines_for(suite.baselines, suite.subnets, searched)
    full, *others = baseline_candidates(task, searched.cost.ratio, chosen, spec, bundle.record, scratch, progress)
    if full.error:
        raise DipgoError(f"{bundle.folder}: the full program cannot be measured ({full.error})")
    further = other_backends([full, own], suite, task, progress)
    torch = partial(TorchSpec, bundle=str(bundle.folder), model=model, threads=threads)
    techniques = [] if baselines else [name for name in suite.baselines if name in TECHNIQUES]
    in_torch = [Candidate(name, torch(technique=name)) for name in techniques]
    count = 0 if task.sampler.draws else min(suite.converged_images, suite.images)  # drawn noise leads elsewhere
    converged = made_by_many_steps(task, bundle, count, suite, progress) if count else None
    return [full, own, *others, *further, *in_torch], converged


def baseline_candidates(
    task: Task,
    ratio: float,
    baselines: Mapping[str, Baseline],
    own: ProgramSpec,
    record: BundleRecord,
    scratch: Path,
    progress: Report,
) -> list[Candidate]:
    """Compile and verify the baselines, the full program first; one that fails is listed with its error.

    ``own`` and ``record`` are the bundle's: baselines have its images a call, and a decoder if it has one.
    """
    batch, whole = latent_shape(record)[0], record.decoder is not None
    compiled = compile_baselines(task, ratio, scratch, baselines, progress, batch, whole)
    candidates = []
    for number, baseline in enumerate(compiled):
        progress("verify baselines", number, len(compiled), baseline.name)
        candidate = Candidate(baseline.name, error=baseline.error)
        if baseline.folder:
            spec = own.model_copy(update={"folder": str(baseline.folder)})
            candidate = _check(Candidate(baseline.name, spec, build_seconds=baseline.seconds), spec, task)
        candidates.append(candidate)
    progress("verify baselines", len(compiled), len(compiled), "")
    return candidates


def other_backends(candidates: list[Candidate], suite: Suite, task: Task, progress: Report) -> list[Candidate]:
    """Return programs in the suite's further backends, verified there too."""
    elsewhere: list[Candidate] = []
    for backend in suite.backends[1:]:
        for candidate in candidates:
            name = f"{candidate.name}, {backend}"
            progress("verify backends", len(elsewhere), len(candidates) * (len(suite.backends) - 1), name)
            if candidate.spec is None or candidate.record is None:
                elsewhere.append(Candidate(name, error=candidate.error))
                continue
            spec = candidate.spec.model_copy(update={"backend": backend})
            assert isinstance(spec, ProgramSpec)
            elsewhere.append(_check(replace(candidate, name=name, spec=spec), spec, task))
    return elsewhere


def write_conditions(program: Program, pipe: Any, count: int, scratch: Path) -> list[str]:
    """Write the conditions of batches for a program that cannot make its own; returns no file where it can."""
    if encodes(program):
        return []
    conditioning, files = program.record.conditioning, []
    batch = latent_shape(program.record)[0]
    batches = max(1, -(-count // batch))
    inputs = inputs_of(program, batches * batch)
    for number in range(min(batches, len(inputs))):
        chosen = inputs[number * batch : (number + 1) * batch]
        path = scratch / f"conditions-{number}.npz"
        save(path, conditions_as_arrays(pipe, chosen, conditioning))
        files.append(str(path))
    return files


def _check(candidate: Candidate, spec: ProgramSpec, task: Task) -> Candidate:
    """Measure a candidate's parity; one that fails it, or anything else, keeps only its error."""
    try:
        with load(Path(spec.folder), spec.threads, spec.backend) as program:
            parity = measure(program, task.pipe, images=1, seed=PARITY_SEED)
            record = program.record
    except Exception as error:  # a baseline may fail in any way; the others go on
        return Candidate(candidate.name, error=one_line(error))
    if not parity.passed:
        return Candidate(candidate.name, error=parity_failure(parity))
    return replace(candidate, parity=parity, record=record)
