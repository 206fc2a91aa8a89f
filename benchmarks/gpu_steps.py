"""What ``make gpu`` measures, in order: each suite of a GPU in each of its backends, and the pace of searches."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.bench.baselines import FULL
from benchmarks.bench.suite import Workload, load_suite, suites
from benchmarks.bench.workload import FEWER, MAIN, compile_programs, measure_programs
from benchmarks.failures import NotMeasuredError
from benchmarks.studies.search_pace import paces

REPEATS = 5  # of each pair
UNSURE = ("tensorrt", "onnxruntime-tensorrt-rtx")  # nobody knows whether they take the GPU; the first program tells
LATER = ("torch-compile", *UNSURE)  # after the searches: they compile for minutes
FIRST = ("gpu-sd15", "gpu-sdxl", "gpu-dit-xl")  # of the suites; others come at the end
SEARCHES = ("block", "layer")
ON_CPU = {"torch": "torch", "torch-compile": "torch"}  # what stands for a backend in a rehearsal; else onnxruntime


@dataclass(frozen=True)
class Step:
    """A suite in one of its backends, or a search by a granularity of sites."""

    name: str
    suite: str
    backend: str | None = None
    sites: str | None = None


def steps() -> list[Step]:
    """Return all steps, the most worth first."""
    names = [name for name in suites() if load_suite(name).workload]
    programs = [
        Step(f"{name.removeprefix('gpu-')}-{backend}", name, backend)
        for name in sorted(names, key=lambda name: (FIRST.index(name) if name in FIRST else len(FIRST), name))
        for backend in load_suite(name).backends
    ]
    searches = [Step(f"search-{sites}", FIRST[0], sites=sites) for sites in SEARCHES]
    early = [step for step in programs if step.suite in FIRST and step.backend not in LATER]
    late = [step for step in programs if step.backend in LATER]
    return [*early, *searches, *late, *(step for step in programs if step not in (*early, *late))]


def work(step: Step, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Measure a step; yields what belongs into its record, as it is found."""
    import torch

    suite, folder = load_suite(step.suite), Path(options["folder"])
    assert suite.workload
    workload, device = suite.workload, "CPU"
    if torch.cuda.is_available():
        name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
        device = f"{name}, compute capability {capability[0]}.{capability[1]}"
    yield {"device": device}
    if options["rehearse"]:
        from benchmarks.bench.rehearsal import small

        workload = small(workload, folder / "models")
    if step.sites:
        yield from _search(step.sites, workload, options["rehearse"])
        return
    backend = step.backend or ""
    if options["rehearse"] and not torch.cuda.is_available():
        backend = ON_CPU.get(backend, "onnxruntime")
    programs = compile_programs(workload, Path(options["bundles"]) / step.suite)
    with tempfile.TemporaryDirectory() as scratch:
        repeats, names = 1 if options["rehearse"] else REPEATS, None
        if step.backend in UNSURE:
            names = [name for name in (FEWER, MAIN, FULL) if name in programs]  # one graph, several, one of each step
        for row in measure_programs(workload, programs, backend, repeats, Path(scratch), names):
            yield {"rows": [row.model_dump(mode="json")]}
            if row.error and step.backend in UNSURE:
                raise NotMeasuredError(row.error)


def _search(sites: str, workload: Workload, rehearse: bool) -> Iterator[dict[str, Any]]:
    from dipgo.model.models import find_model
    from dipgo.searching.config import SearchConfig

    steps = 6 if rehearse else workload.steps
    config = SearchConfig(steps=steps, budget=workload.share, sampler=workload.sampler, preset="gpu")
    precisions, batches = (["bf16"], [1]) if rehearse else (["bf16", "fp16"], [4, 1])
    for pace in paces(find_model(workload.model, random_weights=True), config, [sites], precisions, batches):
        yield {"searches": [pace.model_dump(mode="json")]}
