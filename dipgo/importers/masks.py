"""Step masks: a JSON list of 0 and 1, one per step: compute the whole step, or serve the last output for it.

What is skipped is every site; where one of the sites is the denoiser's output (a UNet's last block, a DiT's
projection), such a step launches nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dipgo.importers.published import Published, by_call, is_mask

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class StepMask(Published):
    """``mask`` is bool ``[steps]``, True = compute."""

    mask: np.ndarray
    format = "a step mask"

    @property
    def steps(self) -> int:
        return len(self.mask)

    def columns(
        self, names: Sequence[str], denoiser: nn.Module, timesteps: Sequence[float]
    ) -> Mapping[str, np.ndarray]:
        return dict.fromkeys(names, by_call(self.mask, timesteps, "the step mask"))


def read_step_mask(document: Any) -> StepMask | None:
    """Read the list; None where the document is something else."""
    return StepMask(np.array(document, bool)) if is_mask(document) else None
