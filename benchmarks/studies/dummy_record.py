"""What became of the pipelines of :mod:`benchmarks.studies.dummies`, as a record and as a page."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from benchmarks.studies.study import StudyRecord
from dipgo.base.records import Record

Outcome = Literal["prompt", "embeddings", "attached", "class", "nothing", "refused", "wrong", "failed"]
RUNS = {
    "prompt": "by prompt",
    "class": "by class",
    "nothing": "unconditionally",
    "embeddings": "by embeddings",
    "attached": "attached to the pipeline, which takes pictures",
}
FAILS = {"refused": "refused", "wrong": "another image", "failed": "a traceback"}


class Row(Record):
    """A pipeline.

    Attributes:
        outcome: what it is run by; ``refused`` in one line, ``wrong`` by what it makes, ``failed`` otherwise.
        stage: how far it came.
        errors: relative distances of what was made: ``latent`` and ``np``, decoded, of embeddings, and by ``prompt``.
            Some pipelines hand out latents in another layout; then images count.
        said: of a pipeline that is refused or fails, else what was warned of.
    """

    name: str
    pipeline: str
    outcome: Outcome
    stage: str
    sampler: str = ""
    errors: dict[str, float] = Field(default_factory=dict)
    said: str = ""
    seconds: float = 0.0


class Dummies(StudyRecord):
    """The result file."""

    counts: dict[str, int]
    rows: list[Row]


def markdown(record: Dummies, source: str) -> str:
    """Return how many run by what, and a table of each kind."""
    run = [row for row in record.rows if row.outcome in RUNS]
    lines = [f"{len(run)} of {len(record.rows)} pipelines run end to end:", "", "| runs | pipelines |", "|---|---|"]
    lines += [
        f"| {what} | {record.counts[kind]} |" for kind, what in {**RUNS, **FAILS}.items() if kind in record.counts
    ]
    lines += ["", "| pipeline | runs | relative error | scheduler |", "|---|---|---|---|"]
    for row in sorted(run, key=lambda row: ([*RUNS].index(row.outcome), row.pipeline)):
        furthest = row.errors.get("prompt") or row.errors.get("np") or max(row.errors.values())
        lines.append(f"| {row.pipeline} | {RUNS[row.outcome].partition(' to')[0]} | {furthest:.1e} | {row.sampler} |")
    lines += ["", "| pipeline | does not run, because |", "|---|---|"]
    lines += [f"| {row.pipeline or row.name} | {row.said} |" for row in record.rows if row.outcome not in RUNS]
    return "\n".join([*lines, "", f"`{record.command}`. From [{source}]({source})."])
