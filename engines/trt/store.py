"""Engines on disk: what they are called, and whether one is still the right one.

They lie in the bundle, in ``engines/``: they go where it goes (a container, another machine) and with it. A bundle may
hold engines of several GPUs and versions, since their names differ. Beside each lies a record, written last, so an
engine without one is a build that was interrupted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from dipgo.base.dtypes import Dtype
from dipgo.base.errors import DipgoError
from dipgo.base.files import new_file, sha256_of, sha256_of_json
from dipgo.base.records import Record, read_record
from engines.trt.library import Library
from engines.trt.loader import BuildOptions, Graph
from engines.trt.timing import keep_aside
from export.bundle import Bundle
from export.records.bundle import BundleRecord
from export.records.graphs import TensorRecord

FOLDER = "engines"
SCHEMA = "dipgo.engine/1"
RECIPE = 1  # raised whenever engines are built in another way, so that older ones are built again


class EngineRecord(Record):
    """``….engine.json``: what an engine was built from, and its file. ``changed_ns`` spares reading a file again."""

    schema_id: Literal["dipgo.engine/1"] = Field(alias="schema", default="dipgo.engine/1")
    graph: str
    key: str
    library: str
    version: str
    target: str
    options: dict[str, Any]
    inputs: list[TensorRecord]
    outputs: list[TensorRecord]
    layers: int
    seconds: float
    bytes: int
    sha256: str
    changed_ns: int


def graphs_of(record: BundleRecord) -> list[Graph]:
    """Return all graphs of a bundle, those of the loop first."""
    return [Graph(file=file, inputs=inputs, outputs=outputs) for file, (inputs, outputs) in record.tensors.items()]


def engine_path(bundle: Bundle, graph: Graph, library: Library, target: str) -> Path:
    """Return where a graph's engine lies: the graph, the library and its version, the GPU, the precision."""
    precision = Dtype(bundle.record.dtype).short
    name = f"{Path(graph.file).stem}.{library.name}-{library.version}.{target}.{precision}.engine"
    return bundle.folder / FOLDER / name


def record_path(engine: Path) -> Path:
    return engine.with_name(f"{engine.name}.json")


def key_of(bundle: Bundle, graph: Graph, library: Library, target: str, options: BuildOptions) -> str:
    """Return the SHA-256 of everything that an engine depends on: graph, weights, library, GPU, shapes, options."""
    record = bundle.record
    tables = {each.tables_file for each in record.every_program}
    tables |= {Path(each.subnet_file).with_suffix(".safetensors").name for each in record.every_program}
    weights = {
        name: file.sha256 for name, file in record.files.items() if name.endswith(".safetensors") and name not in tables
    }
    return sha256_of_json(
        {
            "recipe": RECIPE,
            "graph": record.files[graph.file].sha256,
            "weights": weights,
            "library": [library.name, library.version, target],
            "dtype": record.dtype,
            "inputs": [tensor.model_dump() for tensor in graph.inputs],
            "axes": {name: axis.model_dump() for name, axis in record.axes.items()},
            "options": options.model_dump(),
        }
    )


def find_engine(path: Path, key: str, check: bool = False) -> EngineRecord | None:
    """Return the record of an engine that is whole and was built from this; None where it must be built.

    A damaged engine is kept aside as ``….damaged``. With ``check`` the whole file is read, else only where it was
    touched since it was built.
    """
    try:
        record = read_record(record_path(path), EngineRecord, SCHEMA, "engine record", "build it again")
    except DipgoError:
        return None
    if record.key != key or not path.is_file():
        return None
    status = path.stat()
    touched = status.st_mtime_ns != record.changed_ns
    if status.st_size != record.bytes or ((check or touched) and sha256_of(path) != record.sha256):
        keep_aside(path)
        return None
    return record


def all_built(bundle: Bundle, library: Library, target: str) -> bool:
    """Whether a bundle holds all of its engines for a library and GPU, whole or stripped of weights."""
    return all(
        any(
            find_engine(engine_path(bundle, graph, library, target), key_of(bundle, graph, library, target, options))
            for options in (BuildOptions(), BuildOptions(strip=True))
        )
        for graph in graphs_of(bundle.record)
    )


def save_engine(path: Path, data: Any, **facts: Any) -> EngineRecord:
    """Write an engine (a buffer) and its record; ``facts`` are the fields that are not about the file."""
    record_path(path).unlink(missing_ok=True)
    with new_file(path) as draft:
        draft.write_bytes(data)
        status, checksum = draft.stat(), sha256_of(draft)
    record = EngineRecord(**facts, bytes=status.st_size, sha256=checksum, changed_ns=status.st_mtime_ns)
    with new_file(record_path(path)) as draft:
        draft.write_text(record.text())
    return record
