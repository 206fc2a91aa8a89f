"""Build the engines of a bundle: those that are missing, in child processes, one build of a bundle at a time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from dipgo.base.errors import DipgoError
from dipgo.base.files import full_disk
from dipgo.base.progress import Report, silent
from dipgo.base.records import Record
from engines.cuda.runtime import Device, find_device
from engines.trt.library import Library, find_library, library_named
from engines.trt.loader import BuildOptions, Graph, plan_from_graph
from engines.trt.processes import each
from engines.trt.store import EngineRecord, engine_path, find_engine, graphs_of, key_of, save_engine
from engines.trt.timing import timing_file
from export.bundle import Bundle, open_bundle
from export.records.graphs import AxisRecord

WAITING = "waiting for another build of this bundle"


@dataclass(frozen=True)
class Engine:
    """An engine of a bundle; ``is_new`` says that it was not there before."""

    path: Path
    record: EngineRecord
    is_new: bool


@dataclass(frozen=True)
class Build:
    """What a build came to.

    Attributes:
        engines: one per graph, in the bundle's order.
        library: what they are for, as ``tensorrt-rtx 1.7.1.116``.
        target: the GPUs that they run on.
        device: the GPU of this machine; None where there is none to run them.
    """

    engines: list[Engine]
    library: str
    target: str
    device: Device | None


def build(
    bundle: Bundle,
    workers: int = 1,
    force: bool = False,
    options: BuildOptions = BuildOptions(),
    report: Report = silent,
) -> Build:
    """Build the TensorRT engines of a bundle that it does not hold yet; a killed build goes on where it was.

    Args:
        bundle: a bundle; if anything must be built, all its files are checked before.
        workers: engines to build at a time. On a GPU more than one disturb each other's timings.
        report: called with a phase, how many engines are there, how many there will be, and a name.

    Raises:
        DipgoError: no TensorRT or no ``cuda-bindings`` here, a TensorRT that does not take a graph, a bundle that is
            damaged or cannot be written.
    """
    device = find_device()
    library = find_library(device)
    target = library.target(device)
    if options.strip and device is None:
        raise DipgoError(
            f"{library.name} makes engines without weights only where there is a GPU; build without --strip"
        )
    tasks = [task_for(bundle, graph, library, target, options) for graph in graphs_of(bundle.record)]
    records = {} if force else _engines_there(tasks)
    new: list[str] = []
    if len(records) < len(tasks):
        open_bundle(bundle.folder)
        with _alone(tasks[0].engine.parent, report):
            records = {} if force else _engines_there(tasks)  # another process may have built them
            missing = [task for task in tasks if task.graph.file not in records]
            # The largest first, as far as MACs are known: those of the text encoder and the decoder are not.
            macs = {part.file: part.macs for part in bundle.record.graphs.values()}
            macs |= {part.file: part.macs for each in bundle.record.programs for part in each.prologues}
            missing.sort(key=lambda task: -macs.get(task.graph.file, 0))
            report("build", len(records), len(tasks), "")
            for record in build_all(missing, workers):
                records[record.graph] = record
                new.append(record.graph)
                report("build", len(records), len(tasks), record.graph)
    engines = [Engine(task.engine, records[task.graph.file], task.graph.file in new) for task in tasks]
    return Build(engines, f"{library.name} {library.version}", target, device)


class Task(Record):
    """An engine to build: everything that a child process needs to know."""

    path: Path
    graph: Graph
    axes: dict[str, AxisRecord]
    engine: Path
    key: str
    library: str
    target: str
    options: BuildOptions
    timing: Path | None


def build_all(tasks: list[Task], workers: int) -> Iterator[EngineRecord]:
    """Build engines in child processes; yield their records as they are there."""
    messages = [(str(task.path), task.model_dump(mode="json")) for task in tasks]
    for answer in each("engines.trt.worker", messages, workers):
        yield EngineRecord.model_validate(answer)


def make_engine(task: Task) -> EngineRecord:
    """Build one engine and write it."""
    start = time.perf_counter()
    library = library_named(task.library)
    plan = plan_from_graph(library, task.path, task.graph, task.axes, task.options, task.timing)
    with full_disk(task.engine):
        return save_engine(
            task.engine,
            plan.data,
            graph=task.graph.file,
            key=task.key,
            library=library.name,
            version=library.version,
            target=task.target,
            options=task.options.model_dump(),
            inputs=task.graph.inputs,
            outputs=task.graph.outputs,
            layers=plan.layers,
            seconds=round(time.perf_counter() - start, 3),
        )


def task_for(bundle: Bundle, graph: Graph, library: Library, target: str, options: BuildOptions) -> Task:
    """Return what a child process needs to build the engine of a graph."""
    return Task(
        path=bundle.folder / graph.file,
        graph=graph,
        axes=dict(bundle.record.axes),
        engine=engine_path(bundle, graph, library, target),
        key=key_of(bundle, graph, library, target, options),
        library=library.name,
        target=target,
        options=options,
        timing=timing_file(library, target),
    )


def _engines_there(tasks: list[Task]) -> dict[str, EngineRecord]:
    records = {task.graph.file: find_engine(task.engine, task.key) for task in tasks}
    return {file: record for file, record in records.items() if record is not None}


@contextmanager
def _alone(folder: Path, report: Report) -> Iterator[None]:
    """Hold a folder's lock for as long as a build writes to it; wait for a build that is under way."""
    try:
        folder.mkdir(exist_ok=True)
        lock = FileLock(folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            report(WAITING, 0, 1, "")
            lock.acquire()
            report(WAITING, 1, 1, "")
    except OSError as error:
        raise DipgoError(f"{folder}: cannot be written ({error.strerror}); build in a copy of the bundle") from error
    try:
        yield
    finally:
        lock.release()
