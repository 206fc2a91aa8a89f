"""Lists of whole steps: MeanCache's computed steps, and BudCache's cached ones.

MeanCache (2026) names the steps that it computes, from 0 on, as its source does: ``[0, 1, 3, 7, 14, …]``. BudCache
(2026) names those that it serves from its cache: what its first stage saves with ``torch.save`` is
``{"cache_step": [2, 3, 5, …], "best_loss": …}``, which is read as data, or the same as JSON.

What is read is *when* a step is computed. At the others the last outputs are served as they are; both methods correct
them (an average velocity, the last residual), which a search from here learns as backups (``dipgo search --start``).
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dipgo.base.records import MOST_CALLS
from dipgo.importers.pickles import PERSISTENT, read_pickle
from dipgo.importers.published import Published, by_call

if TYPE_CHECKING:
    from torch import nn

_LARGEST_PICKLE = 2**20  # bytes, unpacked: a list of a few dozen steps
_TENSORS = ("torch._utils._rebuild_tensor_v2", "torch.FloatStorage", "torch.DoubleStorage", "collections.OrderedDict")


@dataclass(frozen=True)
class StepList(Published):
    """``listed`` are the numbers of steps, rising; ``computed`` says whether these, or all others, are computed."""

    listed: Sequence[int]
    computed: bool
    format = "a list of steps"

    def columns(
        self, names: Sequence[str], denoiser: nn.Module, timesteps: Sequence[float]
    ) -> Mapping[str, np.ndarray]:
        steps = len(dict.fromkeys(timesteps))
        if self.listed[-1] >= steps:
            raise ValueError(f"it names step {self.listed[-1]} of {steps} steps; give the --steps it is for")
        mask = np.full(steps, not self.computed)
        mask[list(self.listed)] = self.computed
        return dict.fromkeys(names, by_call(mask, timesteps, "the list of steps"))


def read_step_list(document: Any) -> StepList | None:
    """Read a JSON list of computed steps, or BudCache's dict of cached ones; None where the document is something else.

    A list of 0 and 1 alone is a step mask.

    Raises:
        ValueError: steps that do not rise, or a first step that is not computed.
    """
    if isinstance(document, dict) and "cache_step" in document:
        listed, computed = document["cache_step"], False
    elif isinstance(document, list) and document[:1] == [0] and type(document[-1]) is int and document[-1] > 1:
        listed, computed = document, True
    else:
        return None
    whole = isinstance(listed, list) and all(type(step) is int and 0 <= step < MOST_CALLS for step in listed)
    if not whole or not listed or listed != sorted(set(listed)):
        raise ValueError(f"its steps are to be whole numbers from 0 to {MOST_CALLS - 1}, each larger than the last")
    return StepList(tuple(listed), computed)


def read_budcache(data: bytes) -> StepList:
    """Read what BudCache's first stage saves: a zip around a pickle, of which no code runs.

    Raises:
        ValueError: in one line, what is not as in such a file.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            (entry,) = (info for info in archive.infolist() if info.filename.endswith("/data.pkl"))
            if entry.file_size > _LARGEST_PICKLE:
                raise ValueError("its pickle is larger than a list of steps")
            pickled = archive.read(entry)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise ValueError("the file is damaged, or not one that torch.save wrote") from error
    document = read_pickle(io.BytesIO(pickled), {*_TENSORS, PERSISTENT})
    steps = read_step_list({"cache_step": document["cache_step"]}) if _says_steps(document) else None
    if steps is None:
        raise ValueError("it holds no 'cache_step', the list of steps that BudCache serves from its cache")
    return steps


def _says_steps(document: Any) -> bool:
    return isinstance(document, dict) and "cache_step" in document
