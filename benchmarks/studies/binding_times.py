"""What binding times are worth: the full program with tables and prologues, against one that has all inside its loop.

    python -m benchmarks.studies.binding_times dit-xl-2 --steps 10 -o benchmarks/results/binding-times-dit-xl-2.json

Both are compiled from one conversion, with random weights, and timed interleaved; they must give the same latent.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from diffusers import DDIMScheduler

from benchmarks.bench.environment import Environment, environment, load_average
from benchmarks.bench.parity import relative_error
from benchmarks.bench.timing import Timing, time_interleaved
from dipgo.base.errors import DipgoError
from dipgo.base.files import new_file
from dipgo.base.records import Record
from dipgo.graph.trace import trace
from dipgo.model.models import find_model
from dipgo.model.sampler import tabulate
from dipgo.schedule.cost import cost_of
from dipgo.schedule.subnet import SubNet
from engines.pipeline.pipeline import load
from export.bundle import PartRecord
from export.compiler import prepare, write_bundle
from export.plan.hoisting import Hoisted

GUIDANCE = 4.0
TOLERANCE = 1e-4


class BindingTimes(Record):
    """Seconds of a trajectory of one image, latent in, latent out; ``inside`` is the first of the paired programs."""

    command: str
    model: str
    steps: int
    relative_error: float
    timings: dict[str, Timing]
    parts: list[PartRecord]
    environment: Environment


def compile_both(name: str, steps: int, folder: Path) -> Mapping[str, Path]:
    """Compile the full program twice from one conversion: all ``inside`` the loop, and ``hoisted`` as usual."""
    model = find_model(name, random_weights=True)
    traced = trace(model, "block", GUIDANCE)
    sampler = tabulate(DDIMScheduler(clip_sample=False), steps, model.family.scales_noise)
    gates = np.ones((sampler.calls, len(traced.sites)), bool)
    subnet = SubNet(
        model=model.identity(),
        sampler=sampler.identity(GUIDANCE),
        sites=traced.sites,
        gates=gates,
        cost=cost_of(traced, gates, False),
        terms=1,
        weights={},
        search={"method": "full"},
    )
    hoisted = prepare(traced, whole=False)
    inside = replace(hoisted, hoisted=Hoisted({}, {}), _tables={}, _prologues={})
    for where, prepared in (("inside", inside), ("hoisted", hoisted)):
        write_bundle(prepared, subnet, sampler, folder / where)
    return {where: folder / where for where in ("inside", "hoisted")}


def measure(name: str, steps: int, repeats: int, folder: Path) -> BindingTimes:
    """Compile both programs into ``folder``, compare their latents, and time them.

    Raises:
        DipgoError: they do not agree.
    """
    load_before = load_average()
    with ExitStack() as stack:
        programs = {where: stack.enter_context(load(path)) for where, path in compile_both(name, steps, folder).items()}
        noise = programs["inside"].noise(1, 0)
        drawn = np.random.default_rng(0)
        record = programs["inside"].record
        conditions = {
            tensor.name: np.array([record.conditioning.null_class, 1])
            if record.conditioning.kind == "class"
            else drawn.standard_normal([int(size) for size in tensor.shape]).astype(tensor.dtype)
            for tensor in record.conditioning.inputs
        }
        runs = {where: partial(program.denoise, noise, conditions) for where, program in programs.items()}
        latents = {where: run() for where, run in runs.items()}
        error = relative_error(latents["hoisted"], latents["inside"])
        if not error <= TOLERANCE:
            raise DipgoError(f"{name}: the two programs differ by {error:.1e}; nothing was timed")
        timings = time_interleaved(runs, repeats, warm_up=0)
        parts = programs["hoisted"].record.parts
    return BindingTimes(
        command="python -m benchmarks.studies.binding_times " + shlex.join(sys.argv[1:]),
        model=name,
        steps=steps,
        relative_error=error,
        timings=timings,
        parts=parts,
        environment=environment(load_before),
    )


def main() -> None:
    """Measure a model and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="class-conditional or of prompts, as 'dipgo models' names it")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dipgo-") as folder:
        found = measure(given.model, given.steps, given.repeats, Path(folder))
    for where, timing in found.timings.items():
        print(f"{where}: {timing.wall.median:.2f} s, speedup {timing.speedup.median:.3f}")
    if given.output:
        with new_file(given.output) as draft:
            draft.write_text(found.model_dump_json(indent=1, by_alias=True) + "\n")


if __name__ == "__main__":
    main()
