"""The JSON records that artifacts share, and how they are read. Free of torch: the runtime imports this."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dipgo.base.errors import DipgoError

R = TypeVar("R", bound="Record")


class Record(BaseModel):
    """A frozen piece of a JSON artifact; unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    def text(self) -> str:
        """Return the record as indented JSON."""
        return json.dumps(self.model_dump(mode="json", by_alias=True), indent=2) + "\n"


class ModelIdentity(Record):
    """Which model an artifact belongs to. Fingerprints are SHA-256; random weights have none."""

    name: str
    class_name: str = Field(alias="class")
    config_sha256: str
    weights_sha256: str | None


class SamplerIdentity(Record):
    """The sampler that the gates belong to, as its diffusers class and configuration."""

    class_name: str = Field(alias="class")
    config: dict[str, Any]
    steps: int = Field(ge=2)
    timesteps: list[float]
    guidance_scale: float = Field(allow_inf_nan=False)


def read_json(path: Path, what: str) -> Any:
    """Read a JSON file, or say in one line why not."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise DipgoError(f"{path}: no such {what}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DipgoError(f"{path}: not a readable {what} ({error})") from error


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
    found = raw.get("schema") if isinstance(raw, dict) else None
    if found != schema:
        raise DipgoError(f"{path}: schema is {found!r}, this version reads '{schema}'; {cure}")
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise DipgoError(f"{path}: {place}: {first['msg']}; {cure}, or mend the file") from error
