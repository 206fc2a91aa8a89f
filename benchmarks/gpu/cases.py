"""What is measured, in order of importance: workloads, and pairs of a candidate and its baseline.

To add a workload, name an architecture in :data:`WORKLOADS`; to add a pair, a line in :func:`_pairs`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

FULL = "full"
EAGER = "diffusers"
"""The backend of the model's own code, called as its pipeline calls it; what every full program is held against."""

OURS = ("published", "mixed", "whole-steps")
"""Programs that dipgo makes; the others are baselines."""

NEEDS_CUDA = ("cuda-graph", "compile-graph")
DEEPCACHE = (3, 5)


@dataclass(frozen=True)
class Workload:
    """A model at its true size and how it is sampled.

    Attributes:
        model: name of an architecture that ships with dipgo.
        batch: images a call; guidance doubles the rows.
        dtype: of weights and activations, ``fp32``, ``fp16`` or ``bf16``; latents and solver are float32.
        sampler: alias or class of the scheduler; None for the architecture's own.
        steps, guidance: of the trajectory.
        sites: granularity or patterns of the sites.
        main: the program of 0.2 of the MACs.
    """

    model: str
    batch: int
    dtype: str
    sampler: str | None
    steps: int
    guidance: float
    sites: str
    main: str

    @property
    def name(self) -> str:
        return f"{self.model}/b{self.batch}"

    @property
    def is_unet(self) -> bool:
        return not self.model.startswith("dit")


@dataclass(frozen=True)
class Case:
    """One pair: a program in a backend, and what it is timed against in the same process, in turns.

    ``baseline`` is a backend; its program is the full one.
    """

    workload: Workload
    backend: str
    program: str
    baseline: str

    @property
    def name(self) -> str:
        return f"{self.workload.name}/{self.backend}/{self.program}"

    @property
    def ours(self) -> bool:
        return self.program in OURS


_SD = Workload("sd-1.5", 1, "fp16", "ddim", 50, 7.5, "block", "published")
_DIT = Workload("dit-xl-2", 1, "bf16", None, 50, 4.0, "layer", "whole-steps")
_SDXL = Workload("sdxl", 1, "fp16", None, 50, 5.0, "block", "whole-steps")
WORKLOADS = (_SD, _DIT, _SDXL, *(replace(each, batch=8) for each in (_SD, _DIT, _SDXL)))


def workloads(tiny: bool, cuda: bool) -> list[Workload]:
    """Return the workloads; tiny ones, which try the command and measure nothing of note, have one batch each."""
    if not tiny:
        return list(WORKLOADS)
    small = (_SD, replace(_DIT, steps=10), replace(_SDXL, steps=10))
    return [each if cuda else replace(each, dtype="fp32") for each in small]


def cases(loads: Sequence[Workload], engines: Sequence[str], only: str | None = None) -> list[Case]:
    """Return all pairs, the most important first.

    Args:
        engines: names of backends of :mod:`engines.backends`.
        only: patterns of names (``*`` any characters), joined by commas; a pattern may be the start of a name.
    """
    found = [
        Case(load, backend, program, EAGER if program == FULL else backend)
        for load in loads
        for backend, program in _pairs(load, engines)
    ]
    patterns = [part.strip() for part in (only or "*").split(",") if part.strip()]
    return [case for case in found if any(fnmatchcase(case.name, pattern + "*") for pattern in patterns)]


def _pairs(load: Workload, engines: Sequence[str]) -> list[tuple[str, str]]:
    """Return (backend, program) in order of importance; neighbours share what is dear to build."""
    main = load.main
    pairs = [
        ("cuda-graph", main),
        ("eager", main),
        ("cuda-graph", FULL),
        ("eager", FULL),
        ("cuda-graph", "fewer-steps"),
        ("compile", main),
        ("compile", FULL),
        ("compile-graph", main),
        ("compile-graph", FULL),
        ("cuda-graph", "mixed"),
        ("eager", "mixed"),
        ("eager", "fewer-steps"),
        *((engine, program) for engine in engines for program in (main, "mixed")),
    ]
    if load.is_unet:
        pairs += [(EAGER, f"deepcache-package-{interval}") for interval in DEEPCACHE]
        pairs += [(backend, f"deepcache-{interval}") for backend in ("cuda-graph", "eager") for interval in DEEPCACHE]
    return [
        *pairs,
        ("compile-graph", "mixed"),
        ("compile", "mixed"),
        ("compile-graph", "fewer-steps"),
        ("diffusers-compile", FULL),
    ]
