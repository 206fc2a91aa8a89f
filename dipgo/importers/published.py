"""What every format is read into: what becomes a schedule once a model and its timesteps are known."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

if TYPE_CHECKING:  # a file is recognised, or refused, without torch
    from torch import nn

    from dipgo.graph.trace import Trace


class Published(ABC):
    """What a file says about which modules run when.

    Attributes:
        format: the format's name, as messages show it.
        model: the model it was published for, which is the default; None where the user must say.
        sampler: the sampler it was published for; None takes the model's own.
    """

    format: ClassVar[str]
    model: ClassVar[str | None] = None
    sampler: ClassVar[str | None] = None

    @property
    def steps(self) -> int | None:
        """How many steps the file is for; None where it fits any number."""
        return None

    def sites(self, denoiser: nn.Module) -> str | None:
        """Return the sites to take where the user names none, as :func:`dipgo.graph.sites.site_names` reads them."""
        return None

    @abstractmethod
    def columns(
        self, names: Sequence[str], denoiser: nn.Module, timesteps: Sequence[float]
    ) -> Mapping[str, np.ndarray]:
        """Return the gates of every module that the file speaks of: bool ``[calls]`` by module name.

        Args:
            names: the chosen sites.
            denoiser: for its structure; its weights are never read.
            timesteps: ``[calls]``, one per call of the denoiser.

        Raises:
            ValueError: in one line, why the file does not fit this model or these timesteps.
        """

    def record(self, trace: Trace, gates: np.ndarray) -> dict[str, Any]:
        """Return what else the search record says, given the gates (bool ``[calls, sites]``)."""
        return {}


def is_mask(value: Any) -> bool:
    """Whether a JSON value is a list of 0 and 1, with one entry at least."""
    return isinstance(value, list) and bool(value) and all(entry in (0, 1) for entry in value)


def by_call(rows: np.ndarray, timesteps: Sequence[float], what: str) -> np.ndarray:
    """Return one row per call: there is one per call in ``rows``, or one per distinct timestep.

    PNDM calls the denoiser twice at its second timestep, Heun at all but the first; such calls share their row, as in
    the published code, which looks a row up by its timestep.

    Raises:
        ValueError: neither count fits.
    """
    distinct = list(dict.fromkeys(timesteps))
    if len(rows) == len(timesteps):
        return rows
    if len(rows) == len(distinct):
        return rows[[distinct.index(timestep) for timestep in timesteps]]
    raise ValueError(
        f"{what} has {len(rows)} entries, but the sampler makes {len(timesteps)} calls; give the --steps it is for"
    )
