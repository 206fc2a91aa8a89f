"""Suites: what a benchmark measures, as YAML. Those that ship lie in ``suites/``; their first lines are the command.

A suite holds settings alone: which bundle is measured is said on the command line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from dipgo.base.config import problem, unknown
from dipgo.base.errors import DipgoError, UsageError
from dipgo.base.inputs import read_yaml
from dipgo.base.records import Record

FOLDER = Path(__file__).parents[1] / "suites"
DEFAULT = "quick"
Scope = Literal["loop", "pipeline", "step"]


class Workload(Record):
    """What ``make gpu`` exports, with random weights, and measures; a suite of a GPU has one.

    Attributes:
        model: name of an architecture that ships.
        dtype: of the graphs.
        sampler: alias or class of a scheduler; None keeps the model's own.
        sites: granularity or patterns; None takes the model's own.
        subnet: file of a SubNet whose gates are run, below the project's folder; None runs whole steps at even
            intervals, whose share of the MACs is ``share``.
        batch: images a call.
        small: what changes in the denoiser's configuration where this is rehearsed; its blocks stay those of the large
            one, since the SubNet names them.
    """

    model: str
    steps: int = Field(ge=2)
    dtype: Literal["fp32", "fp16", "bf16"] = "fp16"
    sampler: str | None = None
    sites: str | None = None
    subnet: str | None = None
    share: float = Field(default=0.2, gt=0, le=1)
    batch: int = Field(default=1, ge=1)
    small: dict[str, Any] = Field(default_factory=dict)


class Suite(Record):
    """What is measured, and how often.

    Attributes:
        about: one line on what the suite is for.
        baselines: names out of :mod:`~benchmarks.bench.baselines` and :mod:`~benchmarks.bench.techniques`; the full
            program is always measured, first.
        steps: further step counts of the bundle's solver, for its curve of quality against time.
        subnets: further baselines: name to a SubNet's file, where ``{budget}`` stands for the bundle's.
        backends: of the bundle and the full program; baselines run in the first.
        scopes: ``loop``, the denoising loop, always; ``pipeline``, conditions and decoder with it; ``step``, each step.
        images: that quality is judged on; 0 judges none.
        scale_images: at each of three guidance scales, of ``images``, where a request chooses the scale; 0 for none.
        converged_images, converged_steps: how many of them are compared with a long trajectory too, and its steps.
        warm_up: runs of the loop before the first is timed. 0 leaves out the untimed run before each timed one as well,
            as befits loops of minutes.
        repeats, seconds: the timing of a scope takes at least this many rounds and this long.
        processes: how many processes one after the other share the rounds of each program: memory lies elsewhere in
            each, which moves times by a few per cent.
        parity_images: the bundle's parity is measured on.
        threads: of every program; None leaves the choice to the backend.
        patience: seconds that a program may take to answer before it counts as hung.
        workload: of ``make gpu``; ``dipgo bench`` measures the bundle that it is given.
    """

    about: str
    baselines: list[str] = Field(default_factory=list)
    steps: list[Annotated[int, Field(ge=2)]] = Field(default_factory=list)
    subnets: dict[str, str] = Field(default_factory=dict)
    backends: list[str] = Field(default=["onnxruntime"], min_length=1)
    scopes: list[Scope] = Field(default=["loop", "step"])
    images: int = Field(default=64, ge=0)
    scale_images: int = Field(default=8, ge=0)
    converged_images: int = Field(default=0, ge=0)
    converged_steps: int = Field(default=500, ge=2)
    warm_up: int = Field(default=2, ge=0)
    repeats: int = Field(default=10, ge=1)
    seconds: float = Field(default=10.0, ge=0)
    processes: int = Field(default=1, ge=1)
    parity_images: int = Field(default=2, ge=1)
    threads: int | None = Field(default=None, ge=1)
    patience: float = Field(default=600.0, gt=0)
    workload: Workload | None = None

    def changed(self, **changes: Any) -> Suite:
        """Return the suite with the settings that are given, and not None, in the place of its own."""
        return self.model_validate(
            self.model_dump() | {name: each for name, each in changes.items() if each is not None}
        )


def suites() -> list[str]:
    """Return the names of the suites that ship."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_suite(name: str) -> Suite:
    """Read a suite that ships by its name, or any by its file (``.yaml``).

    Raises:
        UsageError: no such suite, a file that is not YAML, an unknown key, a value that is wrong, or a baseline that
            nobody knows.
    """
    from benchmarks.bench.baselines import BASELINES, FURTHER
    from benchmarks.bench.techniques import TECHNIQUES

    path = FOLDER / f"{name}.yaml" if name in suites() else Path(name)
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        raise UsageError(f"no suite '{name}'; use {', '.join(suites())}, or give a .yaml file")
    try:
        raw = read_yaml(path, "suite")
    except DipgoError as error:
        raise UsageError(str(error)) from error
    if not isinstance(raw, dict):
        raise UsageError(f"{path}: not a suite; give settings as 'name: value' lines")
    try:
        suite = Suite.model_validate(raw)
    except ValidationError as error:
        raise UsageError(f"{path}: {problem(error, Suite)}") from error
    known = [*BASELINES, *FURTHER, *TECHNIQUES]
    strange = [name for name in suite.baselines if name not in known]
    if strange:
        raise UsageError(f"{path}: {unknown('baseline', strange[0], known)}")
    return suite
