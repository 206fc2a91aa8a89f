"""How many pipelines of a folder go end to end: found, traced, exported, run without the model, and equal to diffusers.

    python -m benchmarks.studies.dummies FOLDER --inputs inputs.json -o benchmarks/results/dummies.json

FOLDER holds pipelines, such as :mod:`benchmarks.studies.dummy_pipelines` makes, each saved by ``save_pretrained``.
``--inputs`` has by name what each is called with, of which height, width and prompt count. Every pipeline has a process
of its own: a random SubNet of half the sites is exported, and what its bundle makes by prompt, or else of embeddings,
is compared with the pipeline itself under the same gates, in the image, or in the latent where no bundle decodes. Where
a pipeline takes pictures its bundle is attached to it. A run that was cut short is gone on with.
"""

from __future__ import annotations

import json
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.studies.dummy_record import Dummies, Outcome, Row
from benchmarks.studies.dummy_way import Way
from benchmarks.studies.study import Study, Words, run
from dipgo.base.errors import DipgoError, one_line
from dipgo.base.records import read_object


def measure(folder: Path, inputs: Mapping[str, Any]) -> Row:
    """Take a pipeline all the way, as far as it goes."""
    way, started, said = Way(folder, inputs), time.perf_counter(), ""
    with warnings.catch_warnings(record=True) as caught, tempfile.TemporaryDirectory() as scratch:
        warnings.simplefilter("always")
        try:
            outcome: Outcome = way.go(Path(scratch))
        except DipgoError as error:
            outcome, said = "refused", str(error)
        except Exception as error:  # what must not happen
            outcome, said = "failed", f"{type(error).__name__}: {one_line(error)}"
    lines = [str(each.message) for each in caught if each.category.__name__ == "DipgoWarning"]
    return Row(
        name=folder.name,
        pipeline=str(read_object(folder / "model_index.json", "model_index.json").get("_class_name")),
        outcome=outcome,
        stage=way.stage,
        sampler=way.sampler,
        errors=way.errors,
        said=said or "; ".join(dict.fromkeys(lines)),
        seconds=round(time.perf_counter() - started, 1),
    )


def attempt(study: Study, folder: Path, name: str, *words: object) -> Row:
    """Take a pipeline all the way in a process of its own, which may end in any way."""
    try:
        return Row(**study.alone(folder, "--one", name, *words))
    except DipgoError as error:
        return Row(name=name, pipeline="", outcome="failed", stage="process", said=str(error)[:300])


def main(words: Words | None = None) -> None:
    """Take all pipelines of a folder, or one in this process."""
    study = Study("dummies", __doc__, words, required=False)
    study.parser.add_argument("folder", type=Path)
    study.parser.add_argument("--inputs", type=Path, help="JSON, by name: height, width and prompt")
    study.parser.add_argument("--only", nargs="*", help="names of some")
    study.parser.add_argument("--again", action="store_true", help="also those that -o has already")
    study.parser.add_argument("--one", help="take this one in this process and print its row")
    options = study.options()
    inputs = read_object(options.inputs, "inputs") if options.inputs else {}
    if options.one:
        row = measure(options.folder / options.one, inputs.get(options.one, {}))
        print(json.dumps(row.model_dump()))
        return
    found = sorted(path.parent.name for path in options.folder.glob("*/model_index.json"))
    names = [name for name in options.only or found if name in found]
    given = ("--inputs", options.inputs) if options.inputs else ()
    rows = {} if options.again else _measured(options.output)
    for name in tqdm([name for name in names if name not in rows]):
        rows[name] = attempt(study, options.folder, name, *given)
        tqdm.write(_line(rows[name]))
        counts = dict(Counter(row.outcome for row in rows.values()).most_common())
        study.write(Dummies(counts=counts, rows=[rows[name] for name in sorted(rows)], **study.origin()))
    print(", ".join(f"{count} {outcome}" for outcome, count in Counter(row.outcome for row in rows.values()).items()))


def _measured(output: Path | None) -> dict[str, Row]:
    """Return the rows of an earlier run, which this one goes on from."""
    if output is None or not output.exists():
        return {}
    return {row.name: row for row in Dummies.model_validate(read_object(output, "result")).rows}


def _line(row: Row) -> str:
    errors = " ".join(f"{kind} {error:.1e}" for kind, error in row.errors.items())
    return f"{row.name}: {row.outcome}, {row.stage}, {row.sampler} {errors} {row.seconds:.0f} s {row.said}"


if __name__ == "__main__":
    run(main)
