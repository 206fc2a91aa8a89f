"""The JSON records that artifacts share, and how they are read. Free of torch: the runtime imports this."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, field_validator

from dipgo.base.errors import DipgoError
from dipgo.base.guidance import GuidanceScale
from dipgo.base.inputs import read_json

R = TypeVar("R", bound="Record")

MOST_CALLS = 2000  # of the denoiser in a trajectory: Heun makes 1999 in the 1000 steps that models are trained for
Count = Annotated[int, Field(ge=0, lt=2**63)]
Line = Annotated[str, Field(max_length=1000, pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")]
"""A name or a line of text, which can be shown: without control characters."""
FileName = Annotated[str, Field(max_length=200, pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Timestep = Annotated[float, Field(ge=-1e6, le=1e6)]
_MOST_ERRORS = 1000


class Record(BaseModel):
    """A frozen piece of a JSON artifact; unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    def text(self) -> str:
        """Return the record as indented JSON."""
        return json.dumps(self.model_dump(mode="json", by_alias=True), indent=2) + "\n"


class ModelIdentity(Record):
    """Which model an artifact belongs to. Fingerprints are SHA-256; random weights have none."""

    name: Line
    class_name: Line = Field(alias="class")
    config_sha256: Line
    weights_sha256: Line | None


class Passes(Record):
    """How a pipeline makes the two passes of guidance: the order of them, and in how many calls of its denoiser."""

    conditional_first: bool = False
    calls: int = Field(default=1, ge=1, le=2)


class SamplerIdentity(Record):
    """The sampler that the gates belong to, as its diffusers class and configuration."""

    class_name: Line = Field(alias="class")
    config: dict[str, Any]
    steps: int = Field(ge=2, le=MOST_CALLS)
    timesteps: list[Timestep] = Field(min_length=1, max_length=MOST_CALLS)
    guidance_scale: FiniteFloat
    guidance_rescale: float = Field(default=0.0, ge=0, le=1)
    guidance_spread: float = Field(
        default=0.0, ge=0, allow_inf_nan=False, description="how far from the scale the search's own went"
    )
    passes: Passes = Passes()
    pixels: tuple[int, int] | None = Field(
        default=None, description="height and width of images, where the sampler's table is for one size alone"
    )

    @property
    def guidance(self) -> GuidanceScale:
        """The guidance scale with its rescale and spread, as models are traced with it."""
        return GuidanceScale(self.guidance_scale, self.guidance_rescale, self.guidance_spread)

    @field_validator("config")
    @classmethod
    def _is_of_a_scheduler(cls, config: dict[str, Any]) -> dict[str, Any]:
        trained = config.get("num_train_timesteps", 1000)
        if type(trained) is not int or not 0 < trained <= 100_000:  # schedulers make tables of so many
            raise ValueError(f"num_train_timesteps is {str(trained)[:40]}, expected 1 to 100000")
        return config


def read_object(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON file that holds an object, or say in one line why not."""
    content = read_json(path, what)
    if not isinstance(content, dict):
        raise DipgoError(f"{path}: not a readable {what} (no JSON object)")
    return content


def read_record(path: Path, kind: type[R], schema: str, what: str, cure: str) -> R:
    """Read and validate a JSON artifact.

    Raises:
        DipgoError: a missing or unreadable file, another schema version, or a field that is wrong.
    """
    return validated(read_json(path, what), path, kind, schema, cure)


def validated(raw: Any, path: Path, kind: type[R], schema: str, cure: str) -> R:
    """Return what was read from ``path`` as a record; DipgoError where it is none of this version."""
    version = raw.get("schema") if isinstance(raw, dict) else None
    if version != schema:
        said = repr(version) if isinstance(version, str) else "missing"
        raise DipgoError(f"{path}: schema is {said}, this version reads '{schema}'; {cure}")
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        if error.error_count() > _MOST_ERRORS:  # to list them would take more memory than the file
            raise DipgoError(f"{path}: no record of this kind; {cure}") from None
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise DipgoError(f"{path}: {place}: {first['msg']}; {cure}, or mend the file") from error
