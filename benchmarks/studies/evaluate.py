"""Evaluate a bundle at scale: an image for each prompt of a file, then CLIP score and FID where weights are given.

    python -m benchmarks.studies.evaluate BUNDLE --prompts captions_val2017.json -o DIR --number 5000
    accelerate launch --cpu --num_processes 4 -m benchmarks.studies.evaluate BUNDLE --prompts PartiPrompts.tsv -o DIR

Each image has a seed of its own, its number added to ``--seed``, so it is the same whoever makes it and in what order:
a run that was cut off goes on when the command is given again, and processes share the work.
"""

from __future__ import annotations

import hashlib
import sys
from argparse import SUPPRESS
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field
from tqdm import tqdm

from benchmarks.environment import load_average
from benchmarks.studies.prompts import prompts_of
from benchmarks.studies.settings import Settings
from benchmarks.studies.study import Study, StudyRecord, Words, origin, run
from dipgo.base.config import checked
from dipgo.base.errors import UsageError
from dipgo.base.files import new_file
from dipgo.base.records import Record, read_record
from engines.pipeline.images import to_image
from engines.pipeline.pipeline import load
from engines.program import Program
from engines.sizes import batches_of

SCHEMA: Literal["dipgo.evaluation/1"] = "dipgo.evaluation/1"
PLAN_FILE, RECORD_FILE, IMAGES = "plan.json", "evaluation.json", "images"


class Plan(Record):
    """What is to be made: images of another plan are not mixed with these."""

    schema_id: Literal["dipgo.evaluation/1"] = Field(alias="schema", default=SCHEMA)
    bundle_sha256: str
    prompts_sha256: str
    number: int
    seed: int


class Evaluation(StudyRecord):
    """``evaluation.json``: scores are None where nothing to score with was given; ``skipped`` says so."""

    schema_id: Literal["dipgo.evaluation/1"] = Field(alias="schema", default=SCHEMA)
    plan: Plan
    model: str
    images: int
    clip_score: float | None
    fid: float | None
    skipped: list[str]


@dataclass(frozen=True)
class Share:
    """Which of the processes that share the work this one is; ``wait`` returns when all have come to it."""

    rank: int = 0
    processes: int = 1
    wait: Callable[[], object] = lambda: None


ALONE = Share()


def evaluate(bundle: Path, prompts: Path, output: Path, settings: Settings, share: Share = ALONE) -> Evaluation | None:
    """Make the images that are not there yet, and score all of them; see the module's docstring.

    Args:
        prompts: see :func:`benchmarks.studies.prompts.prompts_of`.
        output: a folder; one that is there must be of the same bundle, prompts, number and seed.

    Returns:
        The record, in the first process; None in the others.

    Raises:
        UsageError: a folder of another plan, or a bundle that prompts do not condition.
        DipgoError: prompts, bundle or weights that cannot be read.
    """
    load_at_start = load_average()
    if (settings.inception is None) != (settings.real is None):
        raise UsageError("FID needs both --inception and --real")
    texts = prompts_of(prompts)[: settings.number]
    with load(bundle, settings.threads, settings.backend) as program:
        if program.record.conditioning.kind != "prompt":
            raise UsageError(f"{bundle}: conditioned by {program.record.conditioning.kind}, not by prompts")
        plan = Plan(
            bundle_sha256=program.record.sha256,
            prompts_sha256=hashlib.sha256("\n".join(texts).encode()).hexdigest(),
            number=len(texts),
            seed=settings.seed,
        )
        _adopt(output, plan, share.rank == 0)
        share.wait()
        _make(program, texts, settings.seed, output / IMAGES, share)
        model = program.record.model.name
    share.wait()
    if share.rank:
        return None
    pictures = [output / IMAGES / _name(index) for index in range(len(texts))]
    place = origin("benchmarks.studies.evaluate", sys.argv[1:], load_at_start)
    record = Evaluation(plan=plan, model=model, images=len(pictures), **_scores(pictures, texts, settings), **place)
    with new_file(output / RECORD_FILE) as draft:
        draft.write_text(record.text())
    return record


def _adopt(output: Path, plan: Plan, first: bool) -> None:
    """Begin a folder, or go on in one of the same plan; all processes check, the first one writes."""
    file = output / PLAN_FILE
    if file.is_file():
        earlier = read_record(file, Plan, SCHEMA, "plan", "give another folder")
        if earlier != plan:
            raise UsageError(f"{output}: holds images of another bundle, prompts, number or seed; give another -o")
        return
    if output.exists() and any(output.iterdir()) and first:
        raise UsageError(f"{output}: exists and is no evaluation; give another -o")
    if first:
        (output / IMAGES).mkdir(parents=True, exist_ok=True)
        with new_file(file) as draft:
            draft.write_text(plan.text())


def _make(program: Program, prompts: Sequence[str], seed: int, folder: Path, share: Share) -> None:
    """Make those of this process's images that are missing, a batch at a time: every ``processes``-th is its own."""
    own = range(share.rank, len(prompts), share.processes)
    missing = np.array([index for index in own if not (folder / _name(index)).is_file()], int)
    for places in tqdm(batches_of(program.record, len(missing)), desc=f"images, process {share.rank}", disable=None):
        batch = missing[places].tolist()
        noise = np.concatenate([program.noise(1, seed + index) for index in batch])
        latents = program.denoise(noise, program.conditions([prompts[index] for index in batch]))
        pixels = program.decode(latents).transpose(0, 2, 3, 1)
        for index, image in zip(dict.fromkeys(batch), pixels, strict=False):  # a last batch is filled up with its last
            with new_file(folder / _name(index)) as draft:
                to_image(image).save(draft)


def _scores(pictures: Sequence[Path], prompts: Sequence[str], settings: Settings) -> dict[str, Any]:
    """Return the fields of the record that hold scores, or say why there are none."""
    from benchmarks.studies import scores

    clip_score, fid, skipped = None, None, []
    if settings.clip:
        clip_score = scores.clip_score(pictures, prompts, settings.clip)
    else:
        skipped.append("CLIP score: no weights were given; give --clip FOLDER")
    if settings.inception and settings.real:
        fid = scores.fid(pictures, settings.real, settings.inception)
    else:
        skipped.append("FID: no weights were given; give --inception FILE and --real FOLDER")
    return {"clip_score": clip_score, "fid": fid, "skipped": skipped}


def _name(index: int) -> str:
    return f"{index:06}.png"


def main(words: Words | None = None) -> None:
    from accelerate import PartialState

    study = Study("evaluate", __doc__, words)
    study.parser.add_argument("bundle", type=Path)
    study.parser.add_argument(
        "--prompts", type=Path, required=True, help="COCO captions .json, PartiPrompts .tsv, text"
    )
    for name, field in Settings.model_fields.items():
        study.parser.add_argument(f"--{name}", default=SUPPRESS, help=field.description)
    options = study.options()
    folder: Path = options.output
    settings = checked(
        Settings, {name: value for name, value in vars(options).items() if name in Settings.model_fields}
    )
    state = PartialState(cpu=True)
    share = Share(state.process_index, state.num_processes, state.wait_for_everyone)
    record = evaluate(options.bundle, options.prompts, folder, settings, share)
    if record is None:
        return
    for line in record.skipped:
        print(f"left out: {line}")
    for name in ("clip_score", "fid"):
        if getattr(record, name) is not None:
            print(f"{name}: {getattr(record, name):.3f}")
    print(f"{record.images} images: {folder / IMAGES}")


if __name__ == "__main__":
    run(main)
