"""Checkpoints of an optimisation: one safetensors file each, replaced whole, and nothing in it is ever unpickled.

Tensors: ``module.*``, ``optimiser.<parameter>.<entry>``, ``rng.*``; the rest is JSON in the file's metadata.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from dipgo.base.errors import DipgoError
from dipgo.base.files import new_file
from dipgo.base.records import Record

SCHEMA = "dipgo.checkpoint/1"


class CheckpointRecord(Record):
    """What a checkpoint says of itself.

    ``iteration`` counts the iterations that are done; ``fingerprint`` is the SHA-256 of the settings that the run was
    begun with, the model's among them.
    """

    schema_id: Literal["dipgo.checkpoint/1"] = Field(alias="schema", default="dipgo.checkpoint/1")
    fingerprint: str
    phase: str
    iteration: int = Field(ge=0)
    scaler: dict[str, int | float]  # torch wants its counters whole


def write_checkpoint(path: Path, record: CheckpointRecord, tensors: dict[str, torch.Tensor]) -> None:
    """Write a checkpoint in the place of the last one, which stays until this one is whole and on disk.

    Raises:
        DipgoError: a full disk; the last checkpoint stays.
    """
    # Written by Python, not by safetensors, whose errors do not say that the disk is full.
    content = save(tensors, {"dipgo": record.model_dump_json(by_alias=True)})
    with new_file(path) as draft, draft.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def read_checkpoint(path: Path) -> tuple[CheckpointRecord, dict[str, torch.Tensor]]:
    """Read a checkpoint.

    Raises:
        DipgoError: a file that is damaged or no checkpoint of this version.
    """
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("dipgo", "")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
        return CheckpointRecord.model_validate_json(text), tensors
    except (SafetensorError, OSError, ValidationError) as error:
        detail = " ".join(str(error).split())[:120]
        raise DipgoError(f"{path}: not a readable checkpoint ({detail}); remove it to begin its phase anew") from error


def pack(module: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return everything that the next iteration depends on, as tensors on the CPU."""
    tensors = {f"module.{name}": value for name, value in _state(module).items()}
    for index, entries in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{index}.{name}": value for name, value in entries.items() if value is not None}
    tensors["rng.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}


def unpack(tensors: dict[str, torch.Tensor], module: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    """Put the tensors of :func:`pack` back.

    Raises:
        ValueError: tensors of another module, named in one line.
    """
    parts: dict[str, dict[str, torch.Tensor]] = {"module": {}, "optimiser": {}, "rng": {}}
    for name, value in tensors.items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = value
    expected = {name: list(value.shape) for name, value in _state(module).items()}
    shapes = {name: list(value.shape) for name, value in parts["module"].items()}
    for name in sorted(expected.keys() | shapes.keys()):
        if expected.get(name) != shapes.get(name):
            raise ValueError(f"its tensor '{name}' is {shapes.get(name)}, this search needs {expected.get(name)}")
    module.load_state_dict(parts["module"], strict=False)
    state: dict[int, dict[str, Any]] = {}
    for name, value in parts["optimiser"].items():
        index, _, entry = name.partition(".")
        state.setdefault(int(index), {})[entry] = value
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
    torch.set_rng_state(parts["rng"]["cpu"])
    if torch.cuda.is_available() and "cuda" in parts["rng"]:
        torch.cuda.set_rng_state(parts["rng"]["cuda"])


def _state(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the state of a module, what it holds under several names once (T5's embedding)."""
    names: dict[int, str] = {}
    state = module.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if names.setdefault(id(value), name) == name}
