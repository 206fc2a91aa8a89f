"""The components of a pipeline beside its denoiser: which there are, and their modules, built without weights.

Parameters are never read, so that a text encoder of billions of them converts in little memory.
"""

from __future__ import annotations

import inspect
from importlib.util import find_spec
from typing import Any

import torch

from dipgo.base.errors import DipgoError
from dipgo.base.records import read_object
from dipgo.model.checks import class_named, component_class
from dipgo.model.empty import empty_module
from dipgo.model.models import Model

VAE = "vae"
LIBRARIES = ("diffusers", "transformers")


def components_of(model: Model) -> tuple[str, ...]:
    """Return the components that a bundle holds beside the denoiser, those that the pipeline has: VAE, text encoders.

    Text encoders whose folder is missing (an architecture) are left out, all of them.
    """
    prompting = model.family.prompting(model.config)
    encoders = [name for name in (prompting.encoders if prompting else ()) if class_of(model, name)]
    if not all((model.folder / name).is_dir() for name in encoders):
        encoders = []
    return (*([VAE] if class_of(model, VAE) else []), *encoders)


def class_of(model: Model, name: str) -> tuple[str, str] | None:
    """Return the library and the class of a component as ``model_index.json`` has them; None where there is none."""
    library, class_name = component_class(read_object(model.folder / "model_index.json", "model_index.json"), name)
    return (library, class_name) if class_name else None


def component_dtype(model: Model, name: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a component computes: ``dtype``, but float32 for a VAE that the pipeline upcasts."""
    if name != VAE or not model.family.upcasts_vae(model.config):
        return dtype
    return torch.float32 if component_config(model, name).get("force_upcast") else dtype


def component_config(model: Model, name: str) -> dict[str, Any]:
    """Return a component's configuration.

    Raises:
        DipgoError: no such file, or one that is not JSON.
    """
    return read_object(model.folder / name / "config.json", f"configuration of the {name}")


def empty_component(model: Model, name: str, dtype: torch.dtype) -> Any:
    """Return a component with its buffers but with weights that were never read or allocated, in evaluation mode.

    Weights have the dtypes with which ``from_pretrained(torch_dtype=…)`` would load them: some stay in float32.

    Raises:
        DipgoError: a class that neither diffusers nor transformers has, or a configuration that does not fit it.
    """
    library, class_name = class_of(model, name) or ("", "")
    index = read_object(model.folder / "model_index.json", "model_index.json")
    pipeline = str(index.get("_class_name"))
    module_class = class_named(library, class_name, pipeline) if library in LIBRARIES else None
    if module_class is None:
        raise foreign(model, name, library, class_name)
    dtype = component_dtype(model, name, dtype)
    names = ["_keep_in_fp32_modules_strict"] * (dtype != torch.float32) + ["_keep_in_fp32_modules"] * (
        dtype == torch.float16
    )
    in_float32 = {part for attribute in names for part in getattr(module_class, attribute, None) or ()}

    def dtype_of(parameter: str) -> torch.dtype:
        return torch.float32 if in_float32.intersection(parameter.split(".")) else dtype

    try:
        return empty_module(module_class, component_config(model, name), dtype_of)
    except DipgoError:
        raise
    except Exception as error:  # whatever a constructor may raise
        detail = " ".join(str(error).split())[:160]
        raise DipgoError(f"{model.folder / name}: not a configuration of {class_name} ({detail})") from error


def left_out(model: Model) -> list[str]:
    """Return what the pipeline does to users' prompts and images that a bundle does not, a line each."""
    import diffusers

    index = read_object(model.folder / "model_index.json", "model_index.json")
    name = str(index.get("_class_name"))
    pipeline = getattr(diffusers, name, None)
    call = inspect.signature(pipeline.__call__).parameters if pipeline else {}
    lines = []
    if class_of(model, "safety_checker"):
        lines.append(f"the bundle has no safety checker: images that {name} blackens come out as they are")
    if pipeline and "add_watermarker" in inspect.signature(pipeline.__init__).parameters and find_spec("imwatermark"):
        lines.append(f"the bundle adds no watermark, as {name} does where invisible-watermark is installed")
    if "clean_caption" in call and call["clean_caption"].default and find_spec("bs4") and find_spec("ftfy"):
        lines.append(f"the bundle does not clean captions, as {name} does unless it is given clean_caption=False")
    return lines


def foreign(model: Model, name: str, library: str, class_name: str) -> DipgoError:
    """Return the error for a component of a library that cannot be exported from."""
    return DipgoError(
        f"{model.folder / 'model_index.json'}: the {name} is a {class_name} of '{library}', which is not "
        "installed here; only classes of diffusers and transformers can be exported"
    )


def parameters_of(model: Model, name: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a component's parameters, by their names in memory."""
    module = empty_component(model, name, torch.float32)
    return {parameter: tuple(value.shape) for parameter, value in module.named_parameters()}
