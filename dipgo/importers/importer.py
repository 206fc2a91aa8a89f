"""From a published file to a SubNet: recognise the format, choose the model, trace it, set the gates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dipgo.base.errors import DipgoError, UsageError
from dipgo.base.files import sha256_of
from dipgo.base.inputs import parse_json, read_input
from dipgo.base.records import MOST_CALLS
from dipgo.importers.deepcache import read_deepcache
from dipgo.importers.dipgo_gates import read_fact_sheet, read_gates_pickle
from dipgo.importers.invardiff import read_invardiff
from dipgo.importers.masks import read_step_mask
from dipgo.importers.published import Published
from dipgo.importers.smoothcache import read_smoothcache
from dipgo.importers.step_lists import read_budcache, read_step_list
from dipgo.schedule.schedule import Schedule
from dipgo.schedule.search_record import SearchRecord
from dipgo.schedule.subnet import SubNet, make_subnet

if TYPE_CHECKING:  # a file is refused before torch is loaded
    from torch import nn

    from dipgo.graph.trace import Trace
    from dipgo.model.sampler import Sampler

FORMATS: tuple[Callable[[Any], Published | None], ...] = (
    read_fact_sheet,
    read_deepcache,
    read_step_mask,
    read_step_list,
    read_invardiff,
    read_smoothcache,
)
KNOWN = (
    "known formats: DiP-GO gates (pickle or JSON), DeepCache's settings, a step mask (list of 0 and 1), a list of "
    "steps (MeanCache's, BudCache's), SmoothCache's schedule, InvarDiff's cache book"
)
_LARGEST = 4 * 2**20  # bytes; the published gates are 0.2 MB


def read_schedule(path: Path) -> Published:
    """Recognise a file by its content and read it. No code in it runs.

    Raises:
        DipgoError: a file that is missing, not UTF-8, of no known format, or wrong within its format.
    """
    data = read_input(path, "schedule file", _LARGEST)
    try:
        published = _read(data)
        if (published.steps or 0) > MOST_CALLS:
            raise ValueError(f"it has {published.steps} steps, more than {MOST_CALLS}")
        return published
    except ValueError as error:
        raise DipgoError(f"{path}: {error}; {KNOWN}") from error


def _read(data: bytes) -> Published:
    if data[:1] == b"\x80":
        return read_gates_pickle(data)
    return read_budcache(data) if data[:4] == b"PK\x03\x04" else _read_text(data)


def _read_text(data: bytes) -> Published:
    try:
        document = parse_json(data.decode())
    except UnicodeDecodeError as error:
        raise ValueError("neither UTF-8 text nor a pickle of gates") from error
    except ValueError as error:
        raise ValueError("neither JSON nor a pickle of gates") from error
    for read in FORMATS:
        published = read(document)
        if published is not None:
            return published
    raise ValueError("a format that is not known")


def import_subnet(
    path: Path,
    model: str | None = None,
    steps: int | None = None,
    sampler: str | None = None,
    sites: str | None = None,
    guidance_scale: float | None = None,
    pixels: tuple[int, int] | None = None,
) -> SubNet:
    """Read a published schedule into a SubNet. No weights are needed.

    What is not given is what the file was published for; then what the model's pipeline has for a default.

    Args:
        path: the file.
        model: name, folder or hub id; DiP-GO gates are for ``sd-1.5``.
        steps: the file's own number where it has one.
        sampler: alias or class; DDIM for DiP-GO gates.
        sites: granularity or patterns; those that the schedule needs.
        guidance_scale: recorded, and part of the traced graph.
        pixels: height and width of images, where the timesteps depend on them.

    Raises:
        DipgoError, UsageError: a file that is refused, or that does not fit the model, sampler, steps or sites.
    """
    published = read_schedule(path)
    name = model or published.model
    if name is None:
        raise UsageError(f"{path} is {published.format}, which does not say for which model; give --model")
    count = steps or published.steps
    if count is None:
        raise UsageError(f"{path} is {published.format}, which fits any number of steps; give --steps")

    from dipgo.graph.trace import trace
    from dipgo.model.models import find_model
    from dipgo.model.sampler import make_scheduler

    own = find_model(name, pixels=pixels)
    if guidance_scale is None:
        guidance_scale = own.default_guidance
    own = own.at(guidance_scale, pixels)
    scheduler = make_scheduler(sampler or published.sampler, own.scheduler)
    table = own.family.table(scheduler, count)
    try:
        denoiser = own.empty_denoiser()
        traced = trace(own, sites or published.sites(denoiser), guidance_scale)
        return apply(published, traced, table, denoiser, file=path.name, sha256=sha256_of(path))
    except ValueError as error:
        raise DipgoError(f"{path}: {error}") from error


def apply(
    published: Published, traced: Trace, sampler: Sampler, denoiser: nn.Module | None = None, **record: str
) -> SubNet:
    """Return the SubNet that a published schedule is on a traced model under a sampler.

    Sites of which the file says nothing are computed, and what is computed for nobody is switched off.
    ``denoiser`` is the traced model's, where it was built before: it is large. ``record`` goes into the search record.

    Raises:
        ValueError: the schedule does not fit, or skips something at step 0.
        UsageError: it speaks of modules that are no sites.
    """
    schedule = schedule_of(published, traced, sampler.timesteps, denoiser or traced.model.empty_denoiser())
    said = published.record(traced, schedule.gates)
    search = SearchRecord(method=f"import of {published.format}", **said, **record)
    return make_subnet(traced, sampler.identity(traced.guidance_scale), schedule, search)


def schedule_of(published: Published, traced: Trace, timesteps: Sequence[float], denoiser: nn.Module) -> Schedule:
    """Return the schedule that :func:`apply` makes a SubNet of."""
    names = [site.name for site in traced.sites]
    columns = published.columns(names, denoiser, timesteps)
    strange = [name for name in columns if name not in names]
    if strange:
        raise UsageError(f"{published.format} gates '{strange[0]}', which is no site; leave --sites out, or add it")
    gates = np.ones((len(timesteps), len(names)), bool)
    for name, column in columns.items():
        gates[:, names.index(name)] = column
    if not gates[0].all():
        raise ValueError("step 0 is not computed in full, but nothing is cached yet")
    return Schedule(gates).canonical(traced)


def summary(subnet: SubNet) -> str:
    """Return one line on an imported SubNet."""
    published, beside = subnet.search.published_macs, ""
    if published:
        beside = f" ({published.ratio:.2%} of {published.full / subnet.calls / 1e9:.2f} G a call as published)"
    signatures = len(np.unique(subnet.gates, axis=0))
    empty = int((~subnet.gates.any(axis=1)).sum())
    return (
        f"{subnet.search.method}: {subnet.gates.sum()} of {subnet.gates.size} gates, {signatures} signatures, "
        f"{empty} empty steps; keeps {subnet.cost.ratio:.2%} of the MACs{beside}"
    )
