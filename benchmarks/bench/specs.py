"""What to measure, as a worker is told it; what a worker makes of it is in :mod:`benchmarks.bench.subjects`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dipgo.base.records import Record


class ProgramSpec(Record):
    """A bundle in a backend. ``conditions`` are files with the conditions of one batch each, in turn, for a program
    that cannot make its own."""

    kind: Literal["program"] = "program"
    folder: str
    backend: str
    threads: int | None = None
    conditions: list[str] = Field(default_factory=list)


class TorchSpec(Record):
    """The model that a bundle was compiled from, whole, in torch: its diffusers denoiser, scheduler and VAE.

    ``technique`` is what is applied to it, see :mod:`benchmarks.bench.techniques`.
    """

    kind: Literal["torch"] = "torch"
    bundle: str
    model: str | None = None
    technique: str
    threads: int | None = None


Spec = Annotated[ProgramSpec | TorchSpec, Field(discriminator="kind")]
