"""Measure how long each site takes in the compiled program: a latency profile for the search.

One program holds a step for every site with that site alone skipped; the times of its steps are solved for the sites'.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from benchmarks.bench.subjects import step_seconds
from benchmarks.environment import cpu_model
from dipgo.base.progress import Report, silent
from dipgo.graph.latency import LatencyProfile, SiteLatency
from dipgo.model.sampler import make_scheduler
from dipgo.schedule.schedule import Schedule
from dipgo.searching.task import Task
from engines.pipeline.pipeline import load
from export.compiler import prepare, write_bundle


def measure_latency(
    task: Task, repeats: int = 30, threads: int | None = None, progress: Report = silent
) -> LatencyProfile:
    """Compile and time; returns the profile of this machine, ONNX Runtime on the CPU, one image a call.

    The time of a step is taken to be the base's plus its computed sites'; least squares over the medians of
    ``repeats`` trajectories solve for them, and what comes out negative is set to 0.
    """
    trace = task.trace
    count = len(trace.sites)
    gates = np.ones((count + 3, count), bool)
    gates[2 : count + 2][np.eye(count, dtype=bool)] = False
    gates[count + 2] = False
    gates[count + 2, trace.output_sites()] = True
    schedule = Schedule(gates).canonical(trace)
    own = task.with_sampler(make_scheduler("ddim", task.pipe.scheduler), schedule.calls)
    subnet = own.subnet(schedule, method="latency profile")
    with tempfile.TemporaryDirectory() as folder:
        write_bundle(prepare(trace), subnet, own.sampler, Path(folder) / "bundle")
        seconds = _step_seconds(Path(folder) / "bundle", repeats, threads, progress)

    measured = schedule.launches(trace)[1:]
    rows = np.column_stack([np.ones(len(measured)), schedule.gates[measured]])
    solved = np.linalg.lstsq(rows, np.median(seconds, axis=0)[measured], rcond=None)[0].clip(min=0)
    base, *sites = (int(value * 1e9) for value in solved)
    return LatencyProfile(
        model=task.model.identity(),
        engine="ONNX Runtime, CPU",
        machine=cpu_model(),
        guidance_scale=task.guidance_scale,
        base_nanoseconds=base,
        sites=[SiteLatency(name=site.name, nanoseconds=ns) for site, ns in zip(trace.sites, sites, strict=True)],
    )


def _step_seconds(folder: Path, repeats: int, threads: int | None, progress: Report) -> np.ndarray:
    """Return seconds ``[repeats, steps]``; one more trajectory before them warms up."""
    with load(folder, threads) as program:
        record = program.record
        noise = program.noise(program.batch, 0)
        inputs = {
            entry.name: np.zeros([int(side) for side in entry.shape], entry.dtype)
            for entry in record.conditioning.inputs
        }
        seconds = np.zeros((repeats + 1, len(record.steps)))
        for repeat in range(repeats + 1):
            progress("latency", repeat, repeats, "")
            seconds[repeat] = step_seconds(program, noise, inputs)
        progress("latency", repeats, repeats, "")
    return seconds[1:]
