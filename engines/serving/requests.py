"""Requests to images, whatever brings them: tensors are checked, and the images of several requests share batches.

A request has R rows, each a class or prompt with a seed of its own, and asks for N images a row.
"""

from __future__ import annotations

import io
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from dipgo.base.errors import UsageError
from dipgo.base.guidance import SCALE
from engines.guidance import Guidance, check_guidance
from engines.pipeline.images import to_image
from engines.program import Program
from engines.serving.limits import Limits
from engines.sizes import batches_of


@dataclass(frozen=True)
class Row:
    """One class or prompt, and how many images of it: those of ``Program.generate([subject] * number, seed)``.

    ``guidance`` is its scale; None is the program's own.
    """

    program: Program
    subject: int | str
    negative: str | None
    seed: int
    number: int
    guidance: float | None = None


def read_rows(program: Program, tensors: Mapping[str, np.ndarray | None], limits: Limits) -> list[Row]:
    """Check a request and return its rows.

    Args:
        program: what it is for.
        tensors: ``class`` or ``prompt`` and ``negative_prompt`` (bytes), ``seed`` (int64), ``number`` (int32), each
            ``[R, 1]``, and where the bundle lets them be chosen ``guidance_scale``, ``budget`` (float32) and ``steps``
            (int32); None where the request lacks one. Without a seed one is drawn.
        limits: what it may ask for.

    Raises:
        UsageError: anything in it that is out of bounds, unknown or malformed.
    """
    kind = program.record.conditioning.kind
    if kind in ("class", "prompt") and tensors.get(kind) is None:
        raise UsageError(f"{kind} is missing")
    rows = next(len(value) for value in tensors.values() if value is not None)
    numbers = _column(tensors.get("number"), rows) or [1] * rows
    if len(set(numbers)) > 1:
        raise UsageError(f"number differs within a request ({numbers[0]} and others); send one request for each")
    if not 1 <= numbers[0] * rows <= limits.images:
        each = f" for each of {rows} rows" if rows > 1 else ""
        raise UsageError(f"number is {numbers[0]}{each}; a request may ask for 1 to {limits.images} images")
    seeds = _column(tensors.get("seed"), rows) or [secrets.randbits(32) for _ in range(rows)]
    subjects: Sequence[int | str] = [0] * rows
    negatives: Sequence[str | None] = [None] * rows
    if kind == "class":
        subjects = [program.class_of(_shortened(text)) for text in _texts("class", tensors, rows, limits)]
    elif kind == "prompt":
        subjects = _texts("prompt", tensors, rows, limits)
        negatives = _texts("negative_prompt", tensors, rows, limits) or negatives
        for negative in negatives:
            program.check_negative(negative)
    steps, budgets, scales = (_choices(tensors.get(name), rows) for name in ("steps", "budget", SCALE))
    programs = [program.at(*choice) for choice in zip(steps, budgets, strict=True)]
    check_guidance(program.record, Guidance([scale for scale in scales if scale is not None]))
    columns = zip(programs, subjects, negatives, seeds, numbers, scales, strict=True)
    return [Row(*row) for row in columns]


def render(rows: Sequence[Row], left: Callable[[int], bool] = lambda row: False) -> list[np.ndarray | None]:
    """Return the images of each row, ``[number, height, width, channels]`` uint8, in as few batches as there can be.

    Only rows of one program with the same negative prompt share a batch. A batch that is not full is filled up and cut.
    ``left`` says, before every step, whether nobody waits for a row any more: a batch of such rows ends there, and they
    are None.
    """
    pictures: list[list[np.ndarray]] = [[] for _ in rows]
    noise = cache(lambda index: rows[index].program.noise(rows[index].number, rows[index].seed))
    for program, negative in dict.fromkeys((row.program, row.negative) for row in rows):
        alike = [index for index, row in enumerate(rows) if (row.program, row.negative) == (program, negative)]
        images = [(index, k) for index in alike for k in range(rows[index].number)]
        for numbers in batches_of(program.record, len(images)):  # what fills the last batch up repeats its last image
            batch = [images[number] for number in numbers]

            def check(indices: frozenset[int] = frozenset(index for index, _ in batch)) -> None:
                if all(left(index) for index in indices):
                    raise _Left

            try:
                check()
                subjects = [rows[index].subject for index, _ in batch]
                usual = program.record.sampler.guidance_scale
                scales = [rows[index].guidance for index, _ in batch]
                guidance = Guidance([usual if scale is None else scale for scale in scales])
                conditions = program.conditions(subjects, negative, guidance=guidance)
                latent = program.denoise(np.stack([noise(index)[k] for index, k in batch]), conditions, None, check)
            except _Left:
                continue
            for (index, _), pixels in zip(batch[: len(np.unique(numbers))], program.decode(latent), strict=False):
                pictures[index].append(levels(pixels.transpose(1, 2, 0)))
    return [np.stack(each) if len(each) == row.number else None for row, each in zip(rows, pictures, strict=True)]


class _Left(Exception):
    """Nobody waits for any image of a batch."""


def levels(pixels: np.ndarray) -> np.ndarray:
    """Turn pixels ``[height, width, channels]`` in [0, 1] into uint8 levels of that shape, as pictures have them."""
    return np.asarray(to_image(pixels)).reshape(pixels.shape)


def png(image: np.ndarray) -> bytes:
    """Return an image ``[height, width, 1 or 3]`` uint8 as a PNG file."""
    stream = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(stream, format="PNG")
    return stream.getvalue()


def _column(values: np.ndarray | None, rows: int) -> list[int]:
    """Return a tensor ``[rows, 1]`` of integers as a list; empty if there is none."""
    return [] if values is None else [int(value) for value in values.reshape(rows)]


def _choices(values: np.ndarray | None, rows: int) -> list[Any]:
    """Return a tensor ``[rows, 1]`` of numbers as a list; None for each row if there is none."""
    return [None] * rows if values is None else values.reshape(rows).tolist()


def _texts(name: str, tensors: Mapping[str, np.ndarray | None], rows: int, limits: Limits) -> list[str]:
    values = tensors.get(name)
    texts = []
    for value in [] if values is None else values.reshape(rows):
        if len(value) > 4 * limits.prompt:  # no character of UTF-8 takes more: do not decode what is far too long
            raise UsageError(f"{name} has {len(value)} bytes; the limit is {limits.prompt} characters")
        try:
            text = bytes(value).decode()
        except UnicodeDecodeError as error:
            raise UsageError(f"{name} is not valid UTF-8 (byte {error.start})") from error
        if len(text) > limits.prompt:
            raise UsageError(f"{name} has {len(text)} characters; the limit is {limits.prompt}")
        texts.append(text)
    return texts


def _shortened(text: str) -> str:
    """A class goes into the error message if it is unknown, so keep it short and on one line."""
    return " ".join(text.split())[:80]
