"""SubNets that a search is given to begin with: imported schedules, or what another search found."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import zip_longest

from dipgo.base.errors import UsageError
from dipgo.base.files import sha256_of_json
from dipgo.graph.trace import Trace
from dipgo.schedule.subnet import SubNet
from dipgo.searching.backup_fit import channels, halves


def check_starts(starts: Sequence[SubNet], trace: Trace, calls: int, terms: int) -> None:
    """Refuse what this search cannot begin with. Other weights or another sampler do no harm: all is judged anew.

    Args:
        calls: calls of the denoiser in a trajectory.
        terms: K of the search.

    Raises:
        UsageError: other sites, another number of calls, more terms, or backups of other outputs.
    """
    widths, rows = channels(trace), halves(trace)
    for number, start in enumerate(starts, 1):
        given, sites = ([site.name for site in owner.sites] for owner in (start, trace))
        odd = next((one or other for one, other in zip_longest(given, sites) if one != other), None)
        if odd:
            raise UsageError(
                f"start {number} has other sites than this search, '{odd}' is the first; search with the --sites that "
                "it was made with"
            )
        if start.calls != calls:
            raise UsageError(
                f"start {number} has {start.calls} calls of the denoiser, this search {calls}; give its --steps"
            )
        if start.terms > terms:
            raise UsageError(f"start {number} combines {start.terms} outputs; search with --set history={start.terms}")
        odd = min(widths.keys() ^ start.weights.keys(), default=None) if start.weights else None
        if odd:
            raise UsageError(f"start {number}: '{odd}' is an output of one model alone; it is of another architecture")
        for name, weights in start.weights.items():
            if weights.ndim > 2 and weights.shape[-1] not in (1, widths[name]):
                raise UsageError(
                    f"start {number}: '{name}' has {weights.shape[-1]} channels, here it has {widths[name]}; it is of "
                    "another architecture"
                )
            if weights.ndim == 4 and rows[name] == 1:
                raise UsageError(
                    f"start {number}: '{name}' has weights for two halves of guidance, here it has one; search with "
                    "the --guidance that it was made with"
                )


def digest_of(start: SubNet) -> str:
    """Return the SHA-256 of gates and weights."""
    weights = {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in start.weights.items()}
    return sha256_of_json({"gates": start.gates.astype(int).tolist(), "weights": weights})
