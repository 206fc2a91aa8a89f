"""What binding times are worth: the full program with tables and prologues, against one that has all inside its loop.

    python -m benchmarks.studies.binding_times dit-xl-2 --steps 10 -o benchmarks/results/binding-times-dit-xl-2.json

Both are compiled from one conversion, with random weights, and timed interleaved; they must give the same latent.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import DDIMScheduler

from benchmarks.bench.quality import latent_error
from benchmarks.bench.timing import Timing, in_rounds, timing_of
from benchmarks.studies.study import Study, StudyRecord, Words, run
from dipgo.base.errors import DipgoError
from dipgo.graph.trace import trace
from dipgo.model.models import find_model
from dipgo.schedule.schedule import Schedule
from dipgo.schedule.search_record import SearchRecord
from dipgo.schedule.subnet import make_subnet
from engines.pipeline.pipeline import load
from export.compiler import prepare, write_bundle
from export.plan.hoisting import Hoisting
from export.records.program import PartRecord

GUIDANCE = 4.0
TOLERANCE = 1e-4


class BindingTimes(StudyRecord):
    """Seconds of a trajectory of one image, latent in, latent out; ``inside`` is the first of the paired programs."""

    model: str
    steps: int
    relative_error: float
    timings: dict[str, Timing]
    parts: list[PartRecord]


def compile_both(name: str, steps: int, folder: Path) -> Mapping[str, Path]:
    """Compile the full program twice from one conversion: all ``inside`` the loop, and ``hoisted`` as usual."""
    model = find_model(name, random_weights=True)
    traced = trace(model, "block", GUIDANCE)
    sampler = model.family.table(DDIMScheduler(clip_sample=False), steps)
    full = Schedule(np.ones((sampler.calls, len(traced.sites)), bool))
    subnet = make_subnet(traced, sampler.identity(GUIDANCE), full, SearchRecord(method="full"))
    hoisted = prepare(traced, whole=False)
    inside = replace(hoisted, hoisting=Hoisting({}, {}), _tables={}, _prologues={})
    for where, prepared in (("inside", inside), ("hoisted", hoisted)):
        write_bundle(prepared, subnet, sampler, folder / where)
    return {where: folder / where for where in ("inside", "hoisted")}


def measure(name: str, steps: int, repeats: int, folder: Path) -> dict[str, Any]:
    """Compile both programs into ``folder``, compare their latents, and time them; returns the record's figures.

    Raises:
        DipgoError: they do not agree.
    """
    with ExitStack() as stack:
        programs = {where: stack.enter_context(load(path)) for where, path in compile_both(name, steps, folder).items()}
        noise = programs["inside"].noise(1, 0)
        generator = np.random.default_rng(0)
        record = programs["inside"].record
        conditions = {
            tensor.name: np.array([record.conditioning.null_class, 1])
            if record.conditioning.kind == "class"
            else generator.standard_normal([int(size) for size in tensor.shape]).astype(tensor.dtype)
            for tensor in record.conditioning.inputs
        }
        runs = {where: partial(program.denoise, noise, conditions) for where, program in programs.items()}
        latents = {where: run() for where, run in runs.items()}
        error = latent_error(latents["hoisted"], latents["inside"])
        if not error <= TOLERANCE:
            raise DipgoError(f"{name}: the two programs differ by {error:.1e}; nothing was timed")
        samples: dict[str, list[float]] = {where: [] for where in runs}

        def sample(where: str) -> None:
            runs[where]()  # so that the timed run does not pay for the caches that the other one left
            started = time.perf_counter()
            runs[where]()
            samples[where].append(time.perf_counter() - started)

        in_rounds(lambda: list(runs), sample, repeats, seconds=0)
        timings = {where: timing_of(own, samples["inside"]) for where, own in samples.items()}
        parts = programs["hoisted"].record.parts
    return {"model": name, "steps": steps, "relative_error": error, "timings": timings, "parts": parts}


def main(words: Words | None = None) -> None:
    study = Study("binding_times", __doc__, words, required=False)
    study.parser.add_argument("model", help="class-conditional or of prompts, as 'dipgo models' names it")
    study.parser.add_argument("--steps", type=int, default=10)
    study.parser.add_argument("--repeats", type=int, default=3)
    options = study.options()
    with tempfile.TemporaryDirectory(prefix="dipgo-") as folder:
        figures = measure(options.model, options.steps, options.repeats, Path(folder))
    record = BindingTimes(**figures, **study.origin())
    for where, timing in record.timings.items():
        print(f"{where}: {timing.wall.median:.2f} s, speedup {timing.speedup.median:.3f}")
    study.write(record)


if __name__ == "__main__":
    run(main)
