"""What holds of every bundle that is read: its records, tables and graphs fit together, so that it runs.

The bounds of single fields stand where the fields are (:mod:`export.records`). Here is what ties them to each other:
each rule yields a line on whatever breaks it. Free of torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain

from dipgo.base.errors import DipgoError
from export.records.bundle import BundleRecord
from export.records.graphs import Signature
from export.rules import conditions, loop, parts
from export.rules.facts import Facts, Tables


def problem(record: BundleRecord, tables: Tables, signatures: Mapping[str, Signature]) -> str | None:
    """Return the first rule that a bundle breaks, as a line; None where all parts fit together.

    ``signatures`` are those of the graphs' files, by name, as far as they are known. Rules are tried in order, each on
    what those before it hold.
    """
    program = Facts(record, tables)
    rules = (
        loop.latents(program),
        parts.files(program, signatures),
        parts.signatures(program, signatures),
        loop.timesteps(program),
        loop.solver(program),
        loop.prologues(program),
        loop.launches(program),
        loop.starts(program),
        conditions.conditions(program),
        conditions.branches(program),
        conditions.guidance(program),
        conditions.control(program),
        conditions.prompts(program),
        conditions.fixed(program),
        parts.images(program),
        parts.pictures(program),
    )
    try:
        return next(chain.from_iterable(rules), None)
    except DipgoError as error:  # of a size
        return str(error)
