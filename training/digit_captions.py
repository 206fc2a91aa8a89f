"""Captions of handwritten digits: the digit in words, and what can be measured of how it is written."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from benchmarks.bench.digit_classifier import WORDS

WEIGHTS, SLANTS = ("thin", "bold"), ("upright", "slanted")
_KINDS = ("{before}{word}", "a handwritten {word}{after}", "the {before}digit {number}", "the number {word}{after}")

Look = tuple[str, str]
"""A word of :data:`WEIGHTS` and one of :data:`SLANTS`, each empty for a digit in between."""


def looks(images: torch.Tensor, labels: torch.Tensor) -> list[Look]:
    """Return how each digit ``[n, 1, h, w]`` in [-1, 1] looks among those of its label.

    The third with the least ink is thin, that with the most bold; upright is the third that leans least to the right,
    slanted that which leans most.
    """
    made = [["", ""] for _ in range(len(labels))]
    for place, (values, words) in enumerate(zip(ink_and_lean(images), (WEIGHTS, SLANTS), strict=True)):
        for label in labels.unique():
            own = torch.nonzero(labels == label).flatten()
            order = own[values[own].argsort()].tolist()
            third = len(order) // 3
            for word, chosen in zip(words, (order[:third], order[len(order) - third :]), strict=True):
                for index in chosen:
                    made[index][place] = word
    return [(weight, slant) for weight, slant in made]


def ink_and_lean(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how much ink digits ``[n, 1, h, w]`` in [-1, 1] have, and how far they lean to the right: ``[n]`` each.

    The lean is the slope of the ink's columns over its rows, by its second moments.
    """
    ink = (images[:, 0].double() + 1) / 2
    total = ink.sum((1, 2))
    rows = torch.arange(ink.shape[1]).double()[:, None].expand(ink.shape[1:])
    columns = torch.arange(ink.shape[2]).double().expand(ink.shape[1:])
    rows, columns = (place - ((ink * place).sum((1, 2)) / total)[:, None, None] for place in (rows, columns))
    return total, -(ink * rows * columns).sum((1, 2)) / (ink * rows.square()).sum((1, 2))


def caption(digit: int, look: Look, draw: np.random.Generator) -> str:
    """Return a caption of any kind; each word of the look is left out half of the time."""
    told = [word for word in look if word and draw.random() < 0.5]
    return _text(digit, told, _KINDS[draw.integers(len(_KINDS))])


def captions() -> list[str]:
    """Return every caption that :func:`caption` can give."""
    return [_text(digit, look, kind) for digit in range(10) for look in _all_looks() for kind in _KINDS]


def prompts() -> list[str]:
    """Return one caption for each digit and look, its kind the next each time: 90 of the 360, digits in turn."""
    return [
        _text(digit, look, _KINDS[(digit + place) % len(_KINDS)])
        for place, look in enumerate(_all_looks())
        for digit in range(10)
    ]


def _all_looks() -> Iterator[list[str]]:
    for weight in ("", *WEIGHTS):
        for slant in ("", *SLANTS):
            yield [word for word in (weight, slant) if word]


def _text(digit: int, look: list[str], kind: str) -> str:
    before, after = ("".join(form.format(word) for word in look) for form in ("{} ", ", {}"))
    return kind.format(before=before, after=after, word=WORDS[digit], number=digit)
