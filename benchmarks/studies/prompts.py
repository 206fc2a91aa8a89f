"""Prompts out of local files as they are published: COCO captions (JSON), PartiPrompts (TSV), or plain text."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from dipgo.base.errors import DipgoError
from dipgo.base.inputs import read_json, read_text
from dipgo.model.prompts import read_prompts

COLUMN = "Prompt"  # of PartiPrompts
LARGEST = 256 * 2**20  # bytes; the captions of COCO-2017 for training have 92 MB


def prompts_of(path: Path) -> list[str]:
    """Read prompts by the file's ending: ``.json`` captions, ``.tsv`` a table, else one a line.

    Of COCO's captions each image's first one counts, in order of the images' numbers, as evaluations of COCO-2017 have
    it.

    Raises:
        DipgoError: a file that is missing, of another form, or holds no prompt.
    """
    if path.suffix == ".json":
        return _captions(path)
    if path.suffix == ".tsv":
        return _column(path)
    return read_prompts(path)


def _captions(path: Path) -> list[str]:
    raw = read_json(path, "caption file", LARGEST)
    first: dict[int, tuple[int, str]] = {}
    try:
        for entry in raw["annotations"]:
            image, number, caption = int(entry["image_id"]), int(entry["id"]), str(entry["caption"])
            if image not in first or number < first[image][0]:
                first[image] = (number, " ".join(caption.split()))
    except (KeyError, TypeError, ValueError) as error:
        raise DipgoError(
            f"{path}: not COCO captions; give annotations/captions_val2017.json, a .tsv or text"
        ) from error
    return _some(path, [caption for _, (_, caption) in sorted(first.items())])


def _column(path: Path) -> list[str]:
    try:
        text = io.StringIO(read_text(path, "table"), newline="")
        rows: list[dict[str, Any]] = list(csv.DictReader(text, delimiter="\t"))
    except csv.Error as error:
        raise DipgoError(f"{path}: not a readable table ({error})") from error
    if rows and COLUMN not in rows[0]:
        raise DipgoError(f"{path}: has no column '{COLUMN}'; give PartiPrompts.tsv, COCO captions or text")
    return _some(path, [row[COLUMN].strip() for row in rows if (row[COLUMN] or "").strip()])


def _some(path: Path, prompts: list[str]) -> list[str]:
    if not prompts:
        raise DipgoError(f"{path}: no prompt in it")
    return prompts
