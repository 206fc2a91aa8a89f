"""The demonstration: a SubNet, the full model, and as many plain steps as take as long, on a few prompts.

A benchmark in little: one process, one thing after another, a round a prompt.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from benchmarks.bench.baselines import EQUAL_TIME, FULL, Share, full, plain_steps, steps_at
from benchmarks.bench.candidates import parity_failure
from benchmarks.bench.parity import Parity, measure
from benchmarks.bench.quality import Outputs, compare
from benchmarks.bench.reference import task_for
from benchmarks.bench.report import SUBJECT, Row
from benchmarks.bench.strips import picture, save
from benchmarks.bench.subjects import IMAGE_SEED
from benchmarks.bench.timing import order, timing_of
from dipgo.base.errors import DipgoError
from dipgo.base.files import new_file
from dipgo.base.progress import Report, silent
from dipgo.model.models import find_model
from dipgo.schedule.subnet import SubNet, load_subnet
from dipgo.searching.task import Task
from engines.pipeline.pipeline import load
from engines.program import Program
from export.compiler import write_bundle
from export.converted import Prepared, prepare
from export.sources import Source, retrace, sampler_of, sites_of

PROMPTS = ("red apple", "owl", "rocket", "birthday cake")  # of names that no search has seen


@dataclass(frozen=True)
class Demonstration:
    """What was seen: ``rows`` are the full model's, the bundle's and the plain steps'."""

    rows: list[Row]
    parity: Parity


def demonstrate(
    files: Sequence[Path],
    bundle: Path,
    drawn: Path,
    force: bool = False,
    prompts: Sequence[str] = PROMPTS,
    report: Report = silent,
) -> Demonstration:
    """Compile SubNets into ``bundle``, measure the first, and draw what the three programs make.

    Args:
        files: of the SubNets; each becomes a program of the bundle.
        drawn: the picture, a PNG.

    Raises:
        DipgoError: the bundle's parity does not hold; then there is no picture.
    """
    subnet, *others = [load_subnet(file) for file in files]
    task = task_for(subnet, find_model(subnet.model.name), progress=report)
    report("compile", 0, 3, "convert")
    prepared = prepare(retrace(task.model, subnet, open_guidance=True))
    with TemporaryDirectory(prefix="dipgo-demo-") as scratch, ExitStack() as stack:

        def compiled(own: Task, schedule: SubNet, folder: Path, further: Sequence[Source] = ()) -> Program:
            write_bundle(prepared, schedule, own.sampler, folder, force, further=further)
            return stack.enter_context(load(folder))

        share = Share(subnet.cost.ratio, subnet.cost.ratio)
        report("compile", 1, 3, SUBJECT)
        further = [_source(each, subnet, prepared) for each in others]
        programs = {SUBJECT: compiled(task, subnet, bundle, further)}
        report("compile", 2, 3, FULL)
        programs[FULL] = compiled(*full(task, share), Path(scratch, "full"))
        report("compile", 3, 3, "")
        with _one_thread():
            parity = measure(programs[SUBJECT], task.pipe, images=1, progress=report)
        if not parity.passed:
            raise DipgoError(f"{bundle}: {parity_failure(parity)}")
        for program in programs.values():  # the first run is slower
            _made(program, prompts[0])
        # The least of some runs: what else the machine does only adds to them.
        least = {name: min(_made(each, prompts[0])[0] for _ in range(3)) for name, each in programs.items()}
        ratio = least[SUBJECT] / least[FULL]
        plain = plain_steps(task, share, steps_at(task, ratio))
        programs[EQUAL_TIME] = compiled(*plain, Path(scratch, "plain"))
        _made(programs[EQUAL_TIME], prompts[0])
        programs = {name: programs[name] for name in (FULL, SUBJECT, EQUAL_TIME)}
        rows, images = _compared(programs, prompts, report)
    with new_file(drawn, force) as draft:
        if labelled := picture(rows, images, range(len(prompts))):
            save(labelled, draft)
    return Demonstration(rows, parity)


def _source(subnet: SubNet, first: SubNet, prepared: Prepared) -> Source:
    """Return what a program beside the first is compiled from; its sites may be others."""
    model = prepared.trace.model
    if sites_of(subnet) != sites_of(first):
        prepared = prepare(retrace(model, subnet, open_guidance=True), whole=False)
    return Source(prepared, subnet, sampler_of(subnet, model))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Have torch compute on one thread: threads that wait for each other take minutes where others take the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _compared(
    programs: Mapping[str, Program], prompts: Sequence[str], report: Report
) -> tuple[list[Row], dict[str, np.ndarray]]:
    """Run all programs in turns, a prompt a round; returns a row of each, and its images ``[n, height, width, 3]``."""
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    latents: dict[str, list[np.ndarray]] = {name: [] for name in programs}
    pixels: dict[str, list[np.ndarray]] = {name: [] for name in programs}
    for number, prompt in enumerate(prompts):
        report("four prompts, three programs", number, len(prompts), prompt)
        for name in order(list(programs), number):
            taken, latent = _made(programs[name], prompt, IMAGE_SEED + number)
            seconds[name].append(taken)
            latents[name].append(latent)
            pixels[name].append(programs[name].decode(latent).transpose(0, 2, 3, 1))
    report("four prompts, three programs", len(prompts), len(prompts), "")
    outputs = {name: Outputs(np.concatenate(latents[name]), np.concatenate(pixels[name])) for name in programs}
    rows = [
        Row(
            name=name,
            steps=program.record.sampler.steps,
            macs=program.record.macs,
            macs_ratio=program.record.macs / programs[FULL].record.macs,
            timing=timing_of(seconds[name], seconds[FULL]),
            quality=compare(outputs[name], outputs[FULL], [], program.record.model.name),
        )
        for name, program in programs.items()
    ]
    return rows, {name: each.images for name, each in outputs.items()}


def _made(program: Program, prompt: str, seed: int = 0) -> tuple[float, np.ndarray]:
    """Return the seconds of the denoising loop for a prompt, and its final latent ``[1, C, H, W]``."""
    noise, conditions = program.noise(1, seed), program.conditions([prompt])
    begin = time.perf_counter()
    latent = program.denoise(noise, conditions)
    return time.perf_counter() - begin, latent
