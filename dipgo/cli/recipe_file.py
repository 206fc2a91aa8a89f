"""Recipes: what to do with a model, from search to images, in one YAML file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from benchmarks.bench.config import BenchConfig
from benchmarks.studies.settings import Settings
from dipgo.base.config import Config, checked, unknown
from dipgo.base.errors import DipgoError, UsageError
from dipgo.base.inputs import parse_yaml, read_yaml
from dipgo.base.own_packages import ROOT
from dipgo.cli.bench import VerifyConfig
from dipgo.cli.run import RunConfig
from dipgo.searching.config import SearchConfig
from export.config import ExportConfig

FOLDER = Path(__file__).parents[1] / "recipes"
SCHEMA = "dipgo.recipe/1"
SHIPPED = ("dipgo/", "benchmarks/")  # files that come with dipgo, wherever it is installed


class EvaluateConfig(Settings):
    """An image for each prompt of a file, and scores; see :mod:`benchmarks.studies.evaluate`."""

    prompts: Path = Field(description="COCO captions .json, PartiPrompts .tsv, or text.")


class Recipe(Config):
    """What is done, in this order, for the sections that are there; without ``search`` with the SubNet of a file."""

    schema_id: Literal["dipgo.recipe/1"] = Field(alias="schema", default="dipgo.recipe/1")
    about: str
    model: str
    random_weights: bool = False
    output: Path
    subnet: Path | None = None
    search: SearchConfig | None = None
    export: ExportConfig | None = None
    verify: VerifyConfig | None = None
    bench: BenchConfig | None = None
    evaluate: EvaluateConfig | None = None
    run: RunConfig | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        if self.subnet and self.search:
            raise ValueError("has both a subnet and a search; give one of them")
        if self.export and not (self.subnet or self.search):
            raise ValueError("exports nothing; give a search, or the file of a subnet")
        if self.export and self.search and self.search.several:
            raise ValueError("search.budget has several, of which export takes one; give one")
        return self

    def sections(self) -> list[str]:
        names = ("search", "export", "verify", "bench", "evaluate", "run")
        return [name for name in names if getattr(self, name) is not None]


def shipped() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read_recipe(file: Path, overrides: Sequence[str] = (), kind: type[Recipe] = Recipe) -> Recipe:
    """Read a recipe: a file, or the name of one that ships.

    Args:
        overrides: such as ``search.budget=0.2``; the value is read as YAML.

    Raises:
        UsageError, DipgoError: in one line, with file and key.
    """
    raw = read_yaml(_located(file), "recipe")
    schema = raw.get("schema") if isinstance(raw, dict) else None
    if schema != SCHEMA:
        raise DipgoError(f"{file}: schema is {schema!r}, this version reads '{SCHEMA}'; 'dipgo recipe ls' lists some")
    for override in overrides:
        _override(raw, override)
    return checked(kind, _with_shipped_files(raw), source=f"{file}: ")


def _located(file: Path) -> Path:
    if file.is_file():
        return file
    name = str(file).removesuffix(".yaml")
    if name not in shipped():
        raise DipgoError(f"{file}: no such file, and {unknown('recipe', name, shipped())}")
    return FOLDER / f"{name}.yaml"


def _override(raw: dict[str, Any], override: str) -> None:
    place, equals, text = override.partition("=")
    *sections, name = place.split(".")
    if not equals or not name:
        raise UsageError(f"'{override}': give KEY=VALUE, such as search.budget=0.2")
    inner: Any = raw
    for section in sections:
        inner = inner.setdefault(section, {}) if isinstance(inner, dict) else inner
        if inner is None:  # a section that is empty in the file
            raise UsageError(f"'{override}': the recipe has no '{section}'")
    if not isinstance(inner, dict):
        raise UsageError(f"'{override}': '{'.'.join(sections)}' is one value, without keys")
    try:
        inner[name] = parse_yaml(text)
    except ValueError as error:
        raise UsageError(f"'{override}': not a value ({error})") from error


def _with_shipped_files(value: Any) -> Any:
    """Return values in which what ships with dipgo is found from anywhere, where nothing here has the same path."""
    if isinstance(value, dict):
        return {name: _with_shipped_files(inner) for name, inner in value.items()}
    if isinstance(value, str) and value.startswith(SHIPPED) and not Path(value).exists() and (ROOT / value).exists():
        return str(ROOT / value)
    return value
