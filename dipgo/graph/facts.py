"""What is known of the models that ship and of the supported denoisers, kept in a file: counting takes seconds.

``python -m dipgo.graph.facts`` counts again; which pipelines run is what ``benchmarks.studies.dummies`` found.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from dipgo.base.records import Record, read_json, read_object

if TYPE_CHECKING:
    from dipgo.model.models import Model

HOW = {
    "prompt": "by prompt",
    "class": "by class",
    "nothing": "unconditionally",
    "embeddings": "from Python, by embeddings",
    "attached": "attached to the pipeline, which takes pictures",
    "refused": "refused, with the reason",
}
FILE = Path(__file__).parents[1] / "zoo" / "facts.json"


class ModelFacts(Record):
    """A model that ships: ``macs`` of one call of the denoiser, and how many sites each granularity has."""

    denoiser: str
    parameters: int
    macs: int
    sites: dict[str, int]
    weights: bool


class Facts(Record):
    """The file.

    Attributes:
        families: site patterns by denoiser and granularity.
        pipelines: classes of diffusers by how they are searched, exported and run; of those that are not, too.
    """

    models: dict[str, ModelFacts]
    families: dict[str, dict[str, list[str]]]
    pipelines: dict[str, list[str]] = Field(default_factory=dict)

    def lines(self) -> list[str]:
        """Return what ``dipgo models`` prints."""
        lines = []
        for title, weights in (("built in:", True), ("architectures, without weights:", False)):
            models = [_line(name, facts) for name, facts in self.models.items() if facts.weights is weights]
            lines += [title, *models, ""]
        lines += [
            "denoisers with sites of their own, from a diffusers folder or a hub id (granularity: site patterns):"
        ]
        for denoiser, sites in self.families.items():
            lines += [f"  {denoiser}", *(f"    {spec}: {', '.join(patterns)}" for spec, patterns in sites.items())]
        other = "any other class whose pipeline can be observed: block (its lists of modules), or --sites PATTERN,…"
        lines += [f"  {other}", "", "pipelines of diffusers, by how small ones are searched, exported and run:"]
        return [*lines, *(f"  {how}: {', '.join(names)}" for how, names in self.pipelines.items())]


def read_facts() -> Facts:
    return Facts.model_validate(read_json(FILE, "list of models"))


def _line(name: str, facts: ModelFacts) -> str:
    counts = ", ".join(f"{count} {spec}" for spec, count in facts.sites.items())
    return (
        f"  {name}: {facts.denoiser}, {facts.parameters / 1e6:.2f} M parameters, {facts.macs / 1e9:.3f} G MACs a call, "
        f"sites: {counts or 'by pattern'}"
    )


def counted(model: Model) -> ModelFacts:
    """Count a model's parameters, MACs and sites; no weights are read."""
    from dipgo.graph.macs import call_macs
    from dipgo.graph.sites import site_names

    denoiser, family = model.empty_denoiser(), model.family
    return ModelFacts(
        denoiser=family.denoiser_class,
        parameters=sum(parameter.numel() for parameter in denoiser.parameters()),
        macs=call_macs(model, denoiser),
        sites={spec: len(site_names(denoiser, family, spec)) for spec in family.sites},
        weights=bool(model.weights_files),
    )


def families() -> dict[str, Any]:
    """Return the site patterns of the supported denoisers."""
    from dipgo.model.families import FAMILIES
    from dipgo.model.families.sites import OBSERVED

    known = {family.denoiser_class: family.sites for family in FAMILIES} | dict(OBSERVED)
    return {name: {spec: list(each) for spec, each in sites.items()} for name, sites in known.items()}


def pipelines(count: Path) -> dict[str, list[str]]:
    """Return classes of pipelines by how they run, from a result of ``benchmarks.studies.dummies``."""
    by_outcome: dict[str, set[str]] = {outcome: set() for outcome in HOW}
    for row in read_object(count, "result")["rows"]:
        by_outcome.setdefault(row["outcome"], set()).add(row["pipeline"])
    return {how: sorted(by_outcome[outcome]) for outcome, how in HOW.items() if by_outcome[outcome]}


if __name__ == "__main__":
    from dipgo.model.models import architectures, built_in, find_model

    found = pipelines(Path("benchmarks/results/dummies.json"))
    models = {name: counted(find_model(name)) for name in (*built_in(), *architectures())}
    FILE.write_text(
        json.dumps(Facts(models=models, families=families(), pipelines=found).model_dump(), indent=2) + "\n"
    )
