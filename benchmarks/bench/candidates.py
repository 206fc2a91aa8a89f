"""What a benchmark measures: the bundle, the full program, the baselines; compiled, verified, ready to be timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.bench.baselines import BASELINES, FULL, Baseline, Compiler, Share, baselines_for
from benchmarks.bench.parity import Parity, measure
from benchmarks.bench.plan import Plan, loop_seconds
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
from engines.torchrt.runner import default_device
from export.bundle import Bundle, open_bundle
from export.records.bundle import BundleRecord


@dataclass(frozen=True)
class Candidate:
    """A program that is to be measured, or why it cannot be; ``record`` is None for the model in torch.

    ``curve`` names the programs that differ in their step counts or budgets alone, this one among them.
    """

    name: str
    spec: ProgramSpec | TorchSpec | None = None
    record: BundleRecord | None = None
    parity: Parity | None = None
    build_seconds: float | None = None
    error: str | None = None
    about: str | None = None
    curve: str | None = None


@dataclass(frozen=True)
class Programs:
    """All that is measured: the full program, the bundle, then the others.

    Attributes:
        converged: what the long trajectory makes, where it is wanted.
        plan: how long measuring will take.
    """

    candidates: list[Candidate]
    converged: Outputs | None
    plan: Plan


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
    further: Sequence[Bundle] = (),
) -> Programs:
    """Return what is to be measured, compiled and verified.

    The model in torch is let go of when this returns: it takes no part in the timing. ``progress`` is told how
    long all will take, as soon as that is known. ``further`` bundles are of the same model and sampler;
    other programs of ``bundle`` itself are measured beside it.

    Raises:
        DipgoError: the bundle or the full program does not run, or the bundle's parity does not hold.
    """
    task = task_of(bundle, model_of(bundle, model), progress)
    if default_device().type != "cpu":  # parity at true size takes an hour on a CPU
        task.pipe.to(default_device())
    spec = ProgramSpec(folder=str(bundle.folder), backend=suite.backends[0], threads=suite.threads)
    with load(bundle.folder, suite.threads, suite.backends[0]) as program:
        parity = measure(program, task.pipe, suite.parity_images, PARITY_SEED, progress)
        if not parity.passed:
            raise DipgoError(f"{bundle.folder}: {parity_failure(parity)}; nothing was measured, export it again")
        spec = spec.model_copy(update={"conditions": write_conditions(program, task.pipe, suite.images, scratch)})
        # What a small program takes by itself, so that torch gets as many; None is its own choice.
        threads = suite.threads or getattr(program.runner, "threads", None)
    own, searched = Candidate(SUBJECT, spec, bundle.record, parity, curve=SUBJECT), subnet_of(bundle)

    whole, batch = bundle.record.decoder is not None, latent_shape(bundle.record)[0]
    progress("the full program", 0, 3, "convert")
    compiler = Compiler(task, scratch, batch, whole)
    progress("the full program", 1, 3, "compile and verify")
    begin = time.perf_counter()
    ratio = searched.cost.ratio
    full = _compiled(compiler, FULL, (baselines or BASELINES)[FULL], Share(ratio, ratio), spec, lambda: None)
    compile_seconds = time.perf_counter() - begin
    if full.error or not isinstance(full.spec, ProgramSpec):
        raise DipgoError(f"{bundle.folder}: the full program cannot be measured ({full.error})")
    progress("the full program", 2, 3, "time")
    known = [each.parity.compiled_seconds if each.parity else None for each in (full, own)]
    seconds = loop_seconds([full.spec, spec], known)
    progress("the full program", 3, 3, "")
    share = Share(ratio, seconds[1] / seconds[0])
    if baselines:
        chosen = {name: each for name, each in baselines.items() if name != FULL}
    else:
        chosen = baselines_for(suite, searched, task, share)
    techniques = [] if baselines else [name for name in suite.baselines if name in TECHNIQUES]
    beside = _beside(bundle, further, spec)
    plan = Plan.of(
        suite,
        batch,
        seconds,
        (parity.torch_seconds or 0) * batch / ratio,
        compiled=2 * len(suite.backends) + len(chosen) + len(beside),
        in_torch=len(techniques),
        compiling=len(chosen) * compile_seconds,
    )
    progress("the benchmark", 0, 0, plan.line())

    others = []
    for number, (name, build) in enumerate(chosen.items()):
        tell = partial(progress, "compile and verify", number, len(chosen))
        tell(f"compile {name}")
        others.append(_compiled(compiler, name, build, share, spec, partial(tell, f"verify {name}")))
    progress("compile and verify", len(chosen), len(chosen), "")
    beside = [_check(each, task) for each in beside]
    elsewhere = other_backends([full, own], suite, task, progress)
    torch = partial(TorchSpec, bundle=str(bundle.folder), model=model, threads=threads)
    in_torch = [Candidate(name, torch(technique=name)) for name in techniques]
    count = 0 if task.sampler.draws else min(suite.converged_images, suite.images)  # drawn noise leads elsewhere
    converged = made_by_many_steps(task, bundle, count, suite, progress) if count else None
    return Programs([full, own, *beside, *others, *elsewhere, *in_torch], converged, plan)


def _compiled(
    compiler: Compiler, name: str, build: Baseline, share: Share, own: ProgramSpec, before_check: Callable[[], None]
) -> Candidate:
    """Compile and verify a baseline; one that fails is listed with its error. ``own`` is the bundle's spec."""
    compiled = compiler.compile(name, build, share)
    if not compiled.folder:
        return Candidate(name, error=compiled.error)
    before_check()
    spec = own.model_copy(update={"folder": str(compiled.folder)})
    candidate = _check(Candidate(name, spec, build_seconds=compiled.seconds), compiler.task)
    if candidate.record is None:
        return candidate
    subnet = subnet_of(open_bundle(compiled.folder, check_files=False))
    if not subnet.gates.all():
        method = subnet.search.method
        return replace(candidate, about=method if method != name else None)
    sampler = candidate.record.sampler
    karras = ", Karras" if sampler.config.get("use_karras_sigmas") else ""
    return replace(
        candidate,
        about=f"{sampler.steps} steps of {sampler.class_name}{karras}",
        curve=f"steps of {sampler.class_name}{karras}",
    )


def _beside(bundle: Bundle, further: Sequence[Bundle], own: ProgramSpec) -> list[Candidate]:
    """Return the bundle's other programs and those of further bundles, which run as ``own``, the first, does."""
    candidates = []
    for each in (bundle, *further):
        for number, program in enumerate(each.programs):
            spec = own.model_copy(update={"folder": str(each.folder), "program": number})
            if spec == own:
                continue
            record, parts = program.record, [SUBJECT]
            parts += [str(each.folder)] if each is not bundle else []
            parts += [f"{record.sampler.steps} steps at {record.budget:.0%}"] if len(each.programs) > 1 else []
            same_steps = record.sampler.steps == bundle.record.sampler.steps
            candidates.append(Candidate(", ".join(parts), spec, curve=SUBJECT if same_steps else None))
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
            elsewhere.append(_check(replace(candidate, name=name, spec=spec, curve=None), task))
    return elsewhere


def write_conditions(program: Program, pipe: Any, count: int, scratch: Path) -> list[str]:
    """Write the conditions of batches for a program that cannot make its own; returns no file where it can."""
    if encodes(program):
        return []
    files: list[str] = []
    batch = latent_shape(program.record)[0]
    batches = max(1, -(-count // batch))
    inputs = inputs_of(program, batches * batch)
    for number in range(min(batches, len(inputs))):
        chosen = inputs[number * batch : (number + 1) * batch]
        path = scratch / f"conditions-{number}.npz"
        save(path, conditions_as_arrays(pipe, chosen, program.record))
        files.append(str(path))
    return files


def _check(candidate: Candidate, task: Task) -> Candidate:
    """Measure the parity of a candidate's program; one that fails it, or anything else, keeps only its error."""
    spec = candidate.spec
    assert isinstance(spec, ProgramSpec)
    try:
        with load(Path(spec.folder), spec.threads, spec.backend) as opened:
            program = opened.programs[spec.program]
            parity = measure(program, task.pipe, images=1, seed=PARITY_SEED)
            record = program.record
    except Exception as error:  # a baseline may fail in any way; the others go on
        return Candidate(candidate.name, error=one_line(error))
    if not parity.passed:
        return Candidate(candidate.name, error=parity_failure(parity))
    return replace(candidate, parity=parity, record=record)
