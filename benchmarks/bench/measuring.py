"""Measure candidates, each in a process of its own, in turns: times, memory, and what they make."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.bench.plan import STEP_RUNS, Parts, Plan
from benchmarks.bench.quality import Outputs, latent_error, latents_as_images
from benchmarks.bench.subjects import IMAGE_SEED, ProgramSpec, TorchSpec
from benchmarks.bench.suite import Suite
from benchmarks.bench.timing import in_rounds
from benchmarks.bench.worker import Worker
from benchmarks.failures import NotMeasuredError
from dipgo.base.progress import Report, silent

STEADY = 1e-4  # relative; how far two runs of one loop on the same noise may be apart


@dataclass
class Outcome:
    """What was measured of one candidate.

    Attributes:
        label: what ran it.
        samples: seconds by scope, one a round.
        skipped: scopes that it does not have, and why.
        device_seconds: of the loop on the device, one a round; empty where there is none.
        outside: share of the loop's time outside its graphs, one a round; empty where it cannot be told.
        steps: seconds ``[runs][steps]``.
        load_seconds, first_seconds: of loading and of the first run, one a process; without a warm-up the
            first run is the first sample.
        resident, proportional, device: peaks in bytes.
        macs: of one trajectory and row, where they were counted.
        final: latents of the timing seed's noise, ``[B, C, H, W]``.
        outputs: latents and images for the judges.
        error: why it was not measured after all.
    """

    label: str = ""
    samples: dict[str, list[float]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    device_seconds: list[float] = field(default_factory=list)
    outside: list[float] = field(default_factory=list)
    steps: list[list[float]] = field(default_factory=list)
    load_seconds: list[float] = field(default_factory=list)
    first_seconds: list[float] = field(default_factory=list)
    resident: int = 0
    proportional: int = 0
    device: int | None = None
    macs: int | None = None
    final: np.ndarray | None = None
    outputs: Outputs | None = None
    error: str | None = None


def measure_all(
    specs: Mapping[str, ProgramSpec | TorchSpec], suite: Suite, scratch: Path, plan: Plan, progress: Report = silent
) -> dict[str, Outcome]:
    """Measure what ``specs`` say, by name; one that fails has an ``error`` and drops out, the others go on.

    Each of ``suite.processes`` generations starts one process a candidate, loads them one after another, warms them up,
    and takes its share of the rounds; the last one makes the images too. Only one process works at a time.
    """
    outcomes, parts = {name: Outcome() for name in specs}, Parts(progress, "measure", plan.parts)
    for generation in range(suite.processes):
        with ExitStack() as stack:
            workers: dict[str, Worker] = {}
            for number, (name, spec) in enumerate(specs.items()):
                parts.report(f"load {generation}", number, len(specs), f"load {name}")
                if outcomes[name].error is None:
                    log = scratch / f"worker-{generation}-{number}.log"
                    workers[name] = stack.enter_context(Worker(spec, log, suite.patience))
                    with _listed(outcomes[name]):
                        _load(workers[name], outcomes[name], suite.warm_up)
            _time(workers, outcomes, suite, partial(_told, parts, generation))
            for name, worker in workers.items():
                with _listed(outcomes[name]):
                    _finish(worker, outcomes[name], scratch)
            if generation == suite.processes - 1:
                _make_all(workers, outcomes, suite, scratch, parts)
    return outcomes


def _told(parts: Parts, generation: int, scope: str, iteration: int, total: int, figure: str) -> None:
    """Report a round of one process's share."""
    parts.report(f"{scope} {generation}", iteration, total, f"time the {scope}")


def _make_all(
    workers: Mapping[str, Worker], outcomes: Mapping[str, Outcome], suite: Suite, scratch: Path, parts: Parts
) -> None:
    """Count MACs, and make the images that are judged."""
    for number, (name, worker) in enumerate(workers.items()):
        outcome = outcomes[name]
        if outcome.error is None and outcome.final is not None:
            with _listed(outcome):
                outcome.macs = worker.ask("macs")["macs"]
                if suite.images:
                    parts.report("images", number, len(workers), f"images of {name}")
                    outcome.outputs = _make(worker, suite.images, outcome.final.shape[0], scratch)
    parts.report("images", 1, 1, "")


@contextmanager
def _listed(outcome: Outcome) -> Iterator[None]:
    """Note a failure in the outcome, and go on."""
    try:
        yield
    except NotMeasuredError as error:
        outcome.error = str(error)


def _load(worker: Worker, outcome: Outcome, warm_up: int) -> None:
    loaded = worker.load()
    outcome.label = loaded["label"]
    outcome.load_seconds.append(loaded["seconds"])
    if warm_up:
        outcome.first_seconds.append(worker.ask("warm_up", rounds=warm_up)["seconds"])


def _time(workers: Mapping[str, Worker], outcomes: Mapping[str, Outcome], suite: Suite, progress: Report) -> None:
    """Take this generation's share of the rounds, a scope after the other."""
    repeats = math.ceil(suite.repeats / suite.processes)
    for scope in dict.fromkeys(["loop", *suite.scopes]):
        if scope == "step":
            runs = min(repeats, STEP_RUNS)
            for run in range(runs):
                progress(scope, run, runs, "")
                for name, worker in workers.items():
                    if outcomes[name].error is None:
                        with _listed(outcomes[name]):
                            outcomes[name].steps.append(worker.ask("steps")["seconds"])
            continue

        def running(scope: str = scope) -> list[str]:
            return [name for name in workers if outcomes[name].error is None and scope not in outcomes[name].skipped]

        def sample(name: str, scope: str = scope) -> None:
            outcome = outcomes[name]
            try:
                answer = workers[name].ask("sample", scope=scope, prepared=suite.warm_up > 0)
            except NotMeasuredError as error:
                if scope == "loop" or workers[name].ended:
                    outcome.error = str(error)
                else:
                    outcome.skipped[scope] = str(error)
                    outcome.samples.pop(scope, None)
                return
            outcome.samples.setdefault(scope, []).append(answer["seconds"])
            if len(outcome.first_seconds) < len(outcome.load_seconds):
                outcome.first_seconds.append(answer["seconds"])
            if answer.get("device_seconds") is not None:
                outcome.device_seconds.append(answer["device_seconds"])
            if answer.get("graph_seconds") is not None:
                outcome.outside.append(1 - answer["graph_seconds"] / answer["seconds"])

        in_rounds(running, sample, repeats, suite.seconds / suite.processes, progress, scope)
        if scope == "loop":
            for name in running():
                outcome = outcomes[name]
                with _listed(outcome):  # before a decoder's memory counts
                    memory = workers[name].ask("memory")
                    outcome.resident = max(outcome.resident, memory["resident_peak"])
                    outcome.proportional = max(outcome.proportional, memory["proportional_peak"])
                    if "device_peak" in memory:
                        outcome.device = max(outcome.device or 0, memory["device_peak"])


def _finish(worker: Worker, outcome: Outcome, scratch: Path) -> None:
    """Read the loop's results, which must be the same from run to run."""
    if outcome.error is not None:
        return
    file = scratch / f"latents-{worker.pid}.npz"
    worker.ask("latents", file=str(file))
    with np.load(file, allow_pickle=False) as arrays:
        drift = latent_error(arrays["last"], arrays["first"])
        outcome.final = arrays["first"]
    if not drift <= STEADY:
        raise NotMeasuredError(f"its result changed from run to run by {drift:.1e} (relative), on the same noise")


def _make(worker: Worker, count: int, batch: int, scratch: Path) -> Outputs:
    latents, images = [], []
    for start in range(0, count, batch):
        file = scratch / f"outputs-{worker.pid}.npz"
        worker.ask("generate", start=start, count=count, seed=IMAGE_SEED, file=str(file))
        with np.load(file, allow_pickle=False) as arrays:
            latents.append(arrays["latents"])
            images.append(arrays["images"] if "images" in arrays.files else latents_as_images(arrays["latents"]))
    outputs = Outputs(np.concatenate(latents), np.concatenate(images))
    if not (np.isfinite(outputs.latents).all() and np.isfinite(outputs.images).all()):
        raise NotMeasuredError("its images are not finite")
    return outputs
