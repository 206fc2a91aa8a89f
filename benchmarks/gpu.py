"""Everything that is to be known of a GPU, in minutes: ``make gpu``, or ``python -m benchmarks.gpu -o build/gpu``.

Steps run in the order of their worth, each in a process of its own with its own time limit; what a step finds is in
``FOLDER/gpu-STEP.json`` (schema ``dipgo.gpu/2``) as soon as it is found. A step that fails or takes too long costs
none of the others. The same command again goes on with the steps that are not measured yet.

The suites ``gpu-*.yaml`` say what is measured: each of their backends is a step. After them come the pace of a search
at true size, by block and by layer, and TensorRT-RTX, if it takes this GPU at all. Weights are random: images are
meaningless. ``--rehearse`` goes through all of it with small models, on the CPU too.

For a machine without a network ``make gpu-packages`` puts into ``build/gpu-packages`` what it lacks beside torch, onnx,
onnxruntime, transformers and accelerate; there it is ``PYTHONPATH=build/gpu-packages python -m benchmarks.gpu``. A run
leaves its bundles in ``FOLDER/bundles``; ``--bundles`` takes those of another.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from benchmarks.bench.suite import load_suite
from benchmarks.bench.workload import Row
from benchmarks.environment import Environment, environment, load_average
from benchmarks.failures import one_line
from benchmarks.gpu_steps import Step, steps, work
from benchmarks.studies.search_pace import Pace
from dipgo.base.child_process import ChildError, ChildProcess, Parent
from dipgo.base.errors import DipgoError
from dipgo.base.files import new_file
from dipgo.base.records import Record, read_record

SCHEMA = "dipgo.gpu/2"
SECONDS = 480.0  # of the whole
STEP_SECONDS = 150.0  # of one step


class StepRecord(Record):
    """What a step found. ``rows`` are programs, ``searches`` the pace of searches; both may end where it failed."""

    schema_id: Literal["dipgo.gpu/2"] = Field(alias="schema", default="dipgo.gpu/2")
    step: str
    about: str
    status: Literal["measured", "failed"]
    error: str | None = None
    rehearsed: bool
    device: str = ""
    seconds: float
    rows: list[Row] = Field(default_factory=list)
    searches: list[Pace] = Field(default_factory=list)
    command: str
    environment: Environment


def json_schema() -> str:
    """Return the JSON Schema of a step's record, published as ``schemas/gpu-2.json``."""
    return json.dumps(StepRecord.model_json_schema(by_alias=True), indent=2) + "\n"


def run(
    folder: Path, bundles: Path, rehearse: bool, seconds: float, step_seconds: float, only: Sequence[str] = ()
) -> list[StepRecord]:
    """Measure the steps that ``folder`` has no measured record of; returns the records of all that were begun.

    Args:
        bundles: folder of the suites' bundles; those that are not there are compiled into it.
        seconds: of the whole; each step has ``step_seconds`` at most.
        only: names of steps; none is all.

    Raises:
        DipgoError: ``folder`` holds a record that cannot be read, or one of a rehearsal beside measurements.
    """
    folder.mkdir(parents=True, exist_ok=True)
    end, records = time.monotonic() + seconds, []
    options = {"folder": str(folder.resolve()), "bundles": str(bundles.resolve()), "rehearse": rehearse}
    for step in steps():
        if only and step.name not in only:
            continue
        if record := _measured(file_of(step, folder), rehearse):
            print(f"{step.name}: measured already", flush=True)
        elif (left := min(step_seconds, end - time.monotonic())) > 0:
            record = _run_alone(step, folder, options, left)
        else:
            print(f"{step.name}: not reached", flush=True)
        records += [record] if record else []
    return records


def file_of(step: Step, folder: Path) -> Path:
    """Return where a step's record lies; copied into ``benchmarks/results`` it has a table of its own."""
    return folder / f"gpu-{step.name}.json"


def _measured(file: Path, rehearse: bool) -> StepRecord | None:
    if not file.is_file():
        return None
    record = read_record(file, StepRecord, SCHEMA, "record of a step", "remove it")
    if record.rehearsed != rehearse:
        raise DipgoError(f"{file}: {'rehearsed' if record.rehearsed else 'measured'}; give another folder")
    return record if record.status == "measured" else None


def _run_alone(step: Step, folder: Path, options: dict[str, Any], seconds: float) -> StepRecord:
    """Run a step in a process of its own for so long at most; its record is written anew with all that it finds."""
    print(f"{step.name}: at most {seconds:.0f} s", flush=True)
    begin, load, found = time.monotonic(), load_average(), {"rows": [], "searches": [], "device": ""}
    status, error = "failed", "was interrupted"

    def write() -> StepRecord:
        record = StepRecord(
            step=step.name,
            about=load_suite(step.suite).about,
            status=status,
            error=None if status == "measured" else error,
            rehearsed=options["rehearse"],
            seconds=round(time.monotonic() - begin, 1),
            **found,
            command=shlex.join(["python", "-m", "benchmarks.gpu", *sys.argv[1:]]),
            environment=environment(load),
        )
        with new_file(file_of(step, folder)) as draft:
            draft.write_text(record.text())
        return record

    try:
        with ChildProcess("benchmarks.gpu", folder / f"{step.name}.log", ["--child"]) as child:
            child.send({"step": step.name, **options})
            while (answer := child.receive(max(0.0, begin + seconds - time.monotonic()))).get("more"):
                for name, value in answer["more"].items():
                    found[name] += value
                for kind, rows in ((Row, "rows"), (Pace, "searches")):
                    for row in answer["more"].get(rows, []):
                        print(f"  {kind.model_validate(row).line()}", flush=True)
                write()
        status, error = ("failed", answer["error"]) if "error" in answer else ("measured", "")
    except ChildError as stopped:
        error = str(stopped)
    record = write()
    print(f"{step.name}: {status} in {record.seconds:.0f} s{f', {error}' if error else ''}", flush=True)
    return record


def _child() -> None:
    parent = Parent()
    for request in parent:
        name = request.pop("step")
        step = next(step for step in steps() if step.name == name)
        try:
            for more in work(step, request):
                parent.send({"more": more})
            parent.send({})
        except Exception as error:  # a step may fail in any way; the parent notes it
            parent.send({"error": one_line(error, 300)})


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("build/gpu"), help="folder of the records")
    parser.add_argument("--bundles", type=Path, help="folder of compiled bundles; OUTPUT/bundles by default")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="after which nothing goes on")
    parser.add_argument("--only", default="", help=f"steps, joined by commas: {', '.join(s.name for s in steps())}")
    parser.add_argument("--rehearse", action="store_true", help="small models, on the CPU where there is no GPU")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.child:
        _child()
        return
    only = [name for name in options.only.split(",") if name]
    bundles = options.bundles or options.output / "bundles"
    step_seconds = options.seconds if options.rehearse else STEP_SECONDS
    records = run(options.output, bundles, options.rehearse, options.seconds, step_seconds, only)
    sys.exit(any(record.status == "failed" for record in records))


if __name__ == "__main__":
    main()
