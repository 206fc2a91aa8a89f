"""SubNets that a search begins with: imported schedules, or what another search found."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import zip_longest

from dipgo.base.errors import UsageError
from dipgo.base.files import sha256_of_json
from dipgo.graph.trace import Trace
from dipgo.schedule.subnet import SubNet
from dipgo.searching.backup_fit import channels, guidance_passes


def check_starts(starts: Sequence[SubNet], trace: Trace, calls: int, history: int) -> None:
    """Refuse what this search cannot begin with. Other weights or another sampler do no harm: all is judged anew.

    Args:
        calls: calls of the denoiser in a trajectory.
        history: K of the search.

    Raises:
        UsageError: other sites, another number of calls, a longer history, or backups of other outputs.
    """
    widths, passes = channels(trace), guidance_passes(trace)
    for number, start in enumerate(starts, 1):
        backups = start.schedule.backups
        own, sites = ([site.name for site in owner.sites] for owner in (start, trace))
        odd = next((one or other for one, other in zip_longest(own, sites) if one != other), None)
        if odd:
            raise UsageError(
                f"start {number} has other sites than this search, '{odd}' is the first; search with the --sites that "
                "it was made with"
            )
        if start.calls != calls:
            raise UsageError(
                f"start {number} has {start.calls} calls of the denoiser, this search {calls}; give its --steps"
            )
        if start.schedule.history > history:
            raise UsageError(
                f"start {number} combines {start.schedule.history} outputs; search with --set "
                f"history={start.schedule.history}"
            )
        odd = min(widths.keys() ^ backups.keys(), default=None) if backups else None
        if odd:
            raise UsageError(f"start {number}: '{odd}' is an output of one model alone; it is of another architecture")
        for name, weights in backups.items():
            if weights.ndim > 2 and weights.shape[-1] not in (1, widths[name]):
                raise UsageError(
                    f"start {number}: '{name}' has {weights.shape[-1]} channels, here it has {widths[name]}; it is of "
                    "another architecture"
                )
            if weights.ndim == 4 and passes[name] == 1:
                raise UsageError(
                    f"start {number}: '{name}' has weights for two passes of guidance, here it has one; search with "
                    "the --guidance that it was made with"
                )


def digest_of(start: SubNet) -> str:
    """Return the SHA-256 of gates and weights."""
    weights = {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in start.schedule.backups.items()}
    return sha256_of_json({"gates": start.gates.astype(int).tolist(), "weights": weights})
