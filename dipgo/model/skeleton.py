"""A pipeline whose networks are empty: its loop, scheduler, tokenizers and configurations, as a folder has them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, NoReturn

from torch import nn

from dipgo.base.errors import DipgoError, UsageError, one_line
from dipgo.base.records import read_object
from dipgo.model.checks import COMPONENTS, LIBRARIES, class_named, component_class
from dipgo.model.empty import empty_module
from dipgo.model.observed.stand_ins import picture_stand_in, text_stand_in
from dipgo.model.sampler import SchedulerConfig, make_scheduler


def skeleton(folder: Path, index: Mapping[str, Any]) -> Any:
    """Return the pipeline of a folder without weights; its text encoders are stand-ins.

    Components that the folder lacks, and those of other libraries than diffusers and transformers, are left out. A
    scheduler that needs a package which is missing gives way to DDIM.

    Raises:
        UsageError: a class that the installed diffusers lacks, or a package that a part of it needs.
        DipgoError: a folder that is damaged.
    """
    import diffusers
    from diffusers.utils import logging

    logging.set_verbosity_error()  # what a pipeline says while it is watched is nobody's business
    name = str(index.get("_class_name"))
    pipeline_class = getattr(diffusers, name, None)
    if not isinstance(pipeline_class, type):
        raise UsageError(f"the installed diffusers has no {name}; only pipelines of its own are supported")
    accepted = signature(pipeline_class).parameters
    parts: dict[str, Any] = {}
    for part, value in index.items():
        if part in accepted:
            library, kind = component_class(index, part)
            is_part = bool(kind) or value == [None, None]  # else an option, such as a list of layers
            parts[part] = _component(folder, part, library, kind, name) if is_part else value
    if "scheduler" in accepted:
        parts["scheduler"] = _scheduler(folder, component_class(index, "scheduler")[1])
    missing = [each for each, option in accepted.items() if each not in parts and option.default is option.empty]
    parts |= dict.fromkeys(each for each in missing if each not in ("args", "kwargs"))
    try:
        return pipeline_class(**parts)
    except ImportError as error:
        raise UsageError(f"{folder}: {one_line(error)}") from error
    except Exception as error:  # whatever a constructor may raise
        raise DipgoError(f"{folder}: {name} cannot be made of it ({one_line(error)}); save it again") from error


def skeleton_of(pipe: Any) -> Any:
    """Return a pipeline in memory as :func:`skeleton` makes that of a folder, whatever its dtype and device.

    Raises:
        UsageError: parts of it cannot be made of their configurations.
    """
    parts = {name: _like(name, part) for name, part in pipe.components.items()}
    options = {name: pipe.config[name] for name in signature(type(pipe)).parameters if name in pipe.config}
    try:
        return type(pipe)(**options | parts)
    except Exception as error:  # whatever a constructor may raise
        raise UsageError(f"{type(pipe).__name__} cannot be made anew of its parts ({one_line(error)})") from error


def _like(name: str, part: Any) -> Any:
    part = getattr(part, "_orig_mod", part)  # what torch.compile has inside
    if name == "scheduler":
        return type(part).from_config(part.config)
    if not isinstance(part, nn.Module):
        return part
    if type(part).__module__.split(".")[0] not in ("diffusers", "transformers"):
        return None
    config: Any = part.config
    return _empty(name, type(part), config.to_dict() if hasattr(config, "to_dict") else config)


def _empty(name: str, kind: Any, config: Mapping[str, Any]) -> nn.Module:
    """Return a network without weights; of one that reads tokens or pictures a stand-in.

    Another than the denoiser is not to be called: nobody knows what it would make.
    """
    from transformers import PreTrainedModel

    module: nn.Module = empty_module(kind, config)
    if issubclass(kind, PreTrainedModel) and "input_ids" in signature(kind.forward).parameters:
        text_stand_in(module)
    elif hasattr(module, "encode") or "pixel_values" in signature(kind.forward).parameters:
        picture_stand_in(module)
    elif name not in COMPONENTS:
        module.forward = partial(_refuse, name)
    return module


def _refuse(name: str, *_: Any, **__: Any) -> NoReturn:
    raise UsageError(f"it calls a network of its own, its {name}")


def _scheduler(folder: Path, class_name: str) -> Any:
    config = read_object(folder / "scheduler" / "scheduler_config.json", "scheduler configuration")
    own = SchedulerConfig(class_name or str(config.get("_class_name")), config)
    try:
        return make_scheduler(None, own)
    except UsageError:
        return make_scheduler("ddim", own)


def _component(folder: Path, part: str, library: str, class_name: str, pipeline: str) -> Any:
    place = folder / part
    if not place.is_dir() or part == "scheduler":
        return None
    kind = class_named(library, class_name, pipeline)
    if kind is None and library not in LIBRARIES:
        return None
    if kind is None:
        raise UsageError(f"{place}: a {class_name}, which the installed {library} does not have; install a newer one")
    try:
        if not issubclass(kind, nn.Module):
            return kind.from_pretrained(place, local_files_only=True)
        return _empty(part, kind, read_object(place / "config.json", f"configuration of the {part}"))
    except ImportError as error:
        raise UsageError(f"{place}: {one_line(error)}") from error
    except DipgoError:
        raise
    except Exception as error:  # whatever a constructor may raise
        raise DipgoError(f"{place}: no {class_name} can be made of it ({one_line(error)})") from error
