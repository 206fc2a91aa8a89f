"""What every format is read into: a schedule that becomes gates once a model and its timesteps are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:  # a file is recognised, or refused, without torch
    from torch import nn

    from dipgo.graph.trace import Trace


class Schedule(Protocol):
    """What a file says about which modules run when.

    Attributes:
        format: the format's name, as messages show it.
        steps: how many steps the file is for; None where it fits any number.
        model: the model it was published for, which is the default; None where the user must say.
        sampler: the sampler it was published for; None takes the model's own.
    """

    @property
    def format(self) -> str: ...
    @property
    def steps(self) -> int | None: ...
    @property
    def model(self) -> str | None: ...
    @property
    def sampler(self) -> str | None: ...

    def sites(self, denoiser: nn.Module) -> str | None:
        """Return the sites to take where the user names none, as :func:`dipgo.graph.sites.site_names` reads them."""

    def columns(
        self, names: Sequence[str], denoiser: nn.Module, timesteps: Sequence[float]
    ) -> Mapping[str, np.ndarray]:
        """Return the gates of every module that the schedule speaks of: bool ``[calls]`` by module name.

        Args:
            names: the chosen sites.
            denoiser: for its structure; its weights are never read.
            timesteps: ``[calls]``, one a call of the denoiser.

        Raises:
            ValueError: in one line, why the schedule does not fit this model or these timesteps.
        """

    def record(self, traced: Trace, gates: np.ndarray) -> dict[str, Any]:
        """Return what else the SubNet notes under ``search``, given its gates (bool ``[calls, sites]``)."""


def is_mask(value: Any) -> bool:
    """Whether a JSON value is a list of 0 and 1, with one entry at least."""
    return isinstance(value, list) and bool(value) and all(entry in (0, 1) for entry in value)


def by_call(rows: np.ndarray, timesteps: Sequence[float], what: str) -> np.ndarray:
    """Return one row a call: rows are given one a call, or one a distinct timestep.

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
