"""torch's CPU noise without torch: the same seed gives the same noise as in diffusers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class Stream:
    """What ``torch.Generator().manual_seed(seed)`` gives on the CPU, one draw after the other.

    Of a seed torch's CPU generator takes the low 32 bits.

    Raises:
        ValueError: a seed that torch refuses.
    """

    def __init__(self, seed: int) -> None:
        if not -(2**63) <= seed < 2**64:
            raise ValueError(f"seed {seed} is outside {-(2**63)} to {2**64 - 1}")
        self._twister = np.random.RandomState(seed % 2**32)

    def randn(self, shape: Sequence[int]) -> np.ndarray:
        """Return what ``torch.randn(shape, generator=…)`` returns next, float32.

        torch draws one 32-bit Mersenne Twister word per value, keeps 24 bits as a uniform number, and turns blocks of
        16 into normal ones by Box-Muller: eight radii, eight angles. The last, incomplete block is drawn anew as a
        whole.

        Raises:
            ValueError: fewer than 16 values (torch then uses another method).
        """
        count = int(np.prod(shape))
        if count < 16:
            raise ValueError(f"{count} values: fewer than the 16 that torch's vectorised method starts at")
        words = self._twister.randint(0, 2**32, size=count + (16 if count % 16 else 0), dtype=np.uint32)
        uniform = (words & np.uint32(0xFFFFFF)).astype(np.float32) * np.float32(2.0**-24)
        values = uniform[:count]
        whole = count - count % 16
        values[:whole] = _box_muller(values[:whole])
        if count % 16:
            values[-16:] = _box_muller(uniform[count:])
        return values.reshape(shape)


def _box_muller(uniform: np.ndarray) -> np.ndarray:
    blocks = uniform.reshape(-1, 2, 8)
    radius = np.sqrt(-2 * np.log(1 - blocks[:, 0]))
    angle = np.float32(2 * np.pi) * blocks[:, 1]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)
