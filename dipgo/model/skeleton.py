"""A pipeline whose networks are empty: its loop, scheduler, tokenizers and configurations, as a folder has them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any

from torch import nn

from dipgo.base.errors import DipgoError, UsageError, one_line
from dipgo.base.records import read_object
from dipgo.model.checks import component_class
from dipgo.model.empty import empty_module
from dipgo.model.observed.stand_ins import text_stand_in


def skeleton(folder: Path, index: Mapping[str, Any]) -> Any:
    """Return the pipeline of a folder without weights; its text encoders are stand-ins.

    Components that the folder lacks, and those of other libraries than diffusers and transformers, are left out.

    Raises:
        UsageError: a class that the installed diffusers lacks, or a package that a part of it needs.
        DipgoError: a folder that is damaged.
    """
    import diffusers

    name = str(index.get("_class_name"))
    pipeline_class = getattr(diffusers, name, None)
    if not isinstance(pipeline_class, type):
        raise UsageError(f"the installed diffusers has no {name}; install the version that the model was made with")
    accepted = signature(pipeline_class).parameters
    parts: dict[str, Any] = {}
    for part, value in index.items():
        if part in accepted:
            parts[part] = _component(folder, part, *component_class(index, part)) if isinstance(value, list) else value
    missing = [each for each, option in accepted.items() if each not in parts and option.default is option.empty]
    parts |= dict.fromkeys(each for each in missing if each not in ("args", "kwargs"))
    try:
        return pipeline_class(**parts)
    except ImportError as error:
        raise UsageError(f"{folder}: {one_line(error)}") from error
    except Exception as error:  # whatever a constructor may raise
        raise DipgoError(f"{folder}: {name} cannot be made of it ({one_line(error)}); save it again") from error


def _component(folder: Path, part: str, library: str, class_name: str) -> Any:
    place = folder / part
    if library not in ("diffusers", "transformers") or not place.is_dir():
        return None
    kind = getattr(importlib.import_module(library), class_name, None)
    if kind is None:
        raise UsageError(f"{place}: a {class_name}, which the installed {library} does not have; install a newer one")
    try:
        if not issubclass(kind, nn.Module):
            return kind.from_pretrained(place, local_files_only=True)
        module = empty_module(kind, read_object(place / "config.json", f"configuration of the {part}"))
    except ImportError as error:
        raise UsageError(f"{place}: {one_line(error)}") from error
    except DipgoError:
        raise
    except Exception as error:  # whatever a constructor may raise
        raise DipgoError(f"{place}: no {class_name} can be made of it ({one_line(error)})") from error
    if library == "transformers" and part.startswith("text_encoder"):
        text_stand_in(module)
    return module
