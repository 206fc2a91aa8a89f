"""The bundle on disk: a deployable folder, opened and checked. Free of torch: this is all that a runtime needs.

``bundle.json`` (:mod:`export.records`) describes the program: per step the launches, each with the slots it reads and
writes. Graphs lie flat in the folder and point into the weights files, which lie as in the pipeline's own folder
(``unet/…safetensors``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path

import numpy as np

from dipgo.base.errors import DipgoError
from dipgo.base.files import Kind, sha256_of
from dipgo.base.inputs import LARGEST_TENSORS, read_tensors
from dipgo.base.records import read_object, read_record
from dipgo.base.safetensors_index import read_file
from export.records.bundle import SCHEMA, BundleRecord
from export.records.graphs import read_signature
from export.rules import problem

RECORD_FILE = "bundle.json"
CURE = "export it again"
WEIGHTS = ".safetensors"
ENGINES = "engines"
"""The folder for what is built of a bundle's graphs."""
_ENGINE = re.compile(r"\.engine(\.json|\.damaged)?$|^\.lock$")


def files_of(folder: Path) -> list[str]:
    """Return the files that a bundle's record names, and its engines; also of a record that is not valid any more."""
    try:
        files = list(read_object(folder / RECORD_FILE, "bundle").get("files", ()))
    except (DipgoError, TypeError):
        files = []
    return files + [f"{ENGINES}/{path.name}" for path in folder.glob(f"{ENGINES}/*") if _ENGINE.search(path.name)]


BUNDLE = Kind(RECORD_FILE, files_of)


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk, whose parts fit together: see :mod:`export.rules`.

    Attributes:
        folder: where it lies.
        record: the content of ``bundle.json``.
        tables: values by step, ``[calls, …]`` each, by name, of the first program.
        further: the other programs, each as a bundle that holds no other.
        adapted: the program with low-rank branches; None where requests bring no LoRAs.
        unguided: the program with the conditional pass alone, if there is one.
    """

    folder: Path
    record: BundleRecord
    tables: dict[str, np.ndarray]
    further: tuple[Bundle, ...] = ()
    adapted: Bundle | None = None
    unguided: Bundle | None = None

    @property
    def programs(self) -> tuple[Bundle, ...]:
        """Each program as a bundle that holds no other, the first first."""
        several = self.further or self.adapted or self.unguided
        first = replace(self, record=self.record.programs[0], further=()) if several else self
        return first, *self.further


def open_bundle(folder: Path, check_files: bool = True) -> Bundle:
    """Read a bundle, check its files against their recorded sizes and checksums, and that its parts fit together.

    Raises:
        DipgoError: no bundle there, another schema version, a missing, altered or unlisted file, a link, or records
            that contradict each other, the tables or the graphs.
    """
    if not folder.is_dir():
        raise DipgoError(f"{folder}: no such bundle; make one with 'dipgo export' or 'dipgo compile'")
    path = folder / RECORD_FILE
    record = read_record(path, BundleRecord, SCHEMA, "bundle", CURE)
    if record.sha256 != record.sealed().sha256:
        raise DipgoError(
            f"{path}: altered since the bundle was made (checksum differs), or made by another dipgo; {CURE}"
        )
    if unlisted := sorted(record.used - record.files.keys()):
        raise DipgoError(f"{path}: '{unlisted[0]}' is not among its files; {CURE}")
    for name, expected in record.files.items():
        _check_place(folder, name, expected.bytes)
        if name.endswith(WEIGHTS) and name not in record.used:
            read_file(folder / name)  # of any size, and filled by its tensors
        elif expected.bytes > LARGEST_TENSORS:  # its reader allows less
            raise DipgoError(f"{folder / name}: larger than any such part of a bundle; {CURE}")
    for name, expected in record.files.items() if check_files else ():
        if sha256_of(folder / name) != expected.sha256:
            raise DipgoError(f"{folder / name}: altered since the bundle was made (checksum differs); {CURE}")
    # A server may be without onnx: then its runtime alone refuses graphs that are not as the record says.
    graphs = {name: read_signature(folder / name, CURE) for name in record.tensors} if find_spec("onnx") else {}
    for what, others in (("low-rank branches", record.adapted), ("one pass", record.one_pass)):
        if others and len(others) != len(record.programs):
            raise DipgoError(f"{path}: not every program has one with {what}; {CURE}")
    programs = []
    for own in (*record.programs, *record.adapted, *record.one_pass):
        tables = read_tensors(folder / own.tables_file, "table of a bundle", CURE)
        if broken := problem(own, tables, {name: graphs[name] for name in own.tensors if graphs}):
            raise DipgoError(f"{path}: {broken}; {CURE}")
        programs.append(Bundle(folder, own, tables))
    count = len(record.programs)
    adapted, unguided = programs[count:][: len(record.adapted)], programs[count + len(record.adapted) :]
    first, *further = (
        replace(own, adapted=branched, unguided=alone)
        for own, branched, alone in zip_longest(programs[:count], adapted, unguided)
    )
    return replace(first, record=record, further=tuple(further))


def _check_place(folder: Path, name: str, size: int) -> None:
    """Check that a file lies in the bundle, not behind a link, and has its size."""
    path = folder / name
    if ".." in Path(name).parts or not path.is_relative_to(folder) or not path.is_file():
        raise DipgoError(f"{path}: missing from the bundle; {CURE}")
    if path.resolve() != folder.resolve() / name:
        raise DipgoError(f"{path}: lies behind a link, which a bundle has none of; copy the bundle with cp -rL")
    if path.stat().st_size != size:
        raise DipgoError(f"{path}: altered since the bundle was made (its size differs); {CURE}")
