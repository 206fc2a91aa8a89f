"""Whether a denoiser in memory is the one that a bundle was compiled from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from dipgo.base.errors import UsageError
from dipgo.model.families import family_for
from dipgo.model.models import Model
from export.bundle import Bundle

_SAMPLE = 4096  # elements that are compared of each parameter
_TOLERANCES = {torch.float32: 1e-6, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}  # relative, two roundings


def check_denoiser(bundle: Bundle, denoiser: Any) -> None:
    """Compare a denoiser's class, configuration and parameters with the bundle's.

    Of parameters the first elements are compared with the bundle's weights files, to the coarser of both precisions:
    a LoRA, fused or not, or weights of another training are seen.

    Raises:
        UsageError: naming what differs.
    """
    mine = bundle.record.model
    if type(denoiser).__name__ != mine.class_name:
        raise UsageError(
            f"the denoiser is a {type(denoiser).__name__}, the bundle was compiled from a {mine.class_name}"
        )
    digest = _config_sha256(denoiser, mine.class_name)
    if digest != mine.config_sha256:
        raise UsageError(
            f"the denoiser's configuration ({digest[:32]}) is not that of '{mine.name}' ({mine.config_sha256[:32]}), "
            "which the bundle was compiled from; attach it to that model"
        )
    parameters = dict(denoiser.named_parameters())
    adapter = next((name for name in parameters if "lora_" in name), None)
    if adapter:
        raise UsageError(f"the denoiser has an adapter ('{adapter[:80]}'), the bundle was compiled without; unload it")
    for file in bundle.record.files:
        if file.endswith(".safetensors") and Path(file).parent.name in ("unet", "transformer"):
            _check_weights(bundle, file, parameters)


def _config_sha256(denoiser: Any, class_name: str) -> str:
    config = json.loads(denoiser.to_json_string())
    component = "unet" if "UNet" in class_name else "transformer"
    family = family_for(class_name, component, config, "")
    return Model("", Path(), family, config, random_weights=True).identity().config_sha256


def _check_weights(bundle: Bundle, file: str, parameters: dict[str, torch.nn.Parameter]) -> None:
    with safe_open(bundle.folder / file, "pt") as stored:
        for name in stored.keys():  # noqa: SIM118 - not a mapping
            parameter = parameters.get(name)
            if parameter is None or parameter.is_meta or not parameter.is_floating_point():
                continue
            whole = stored.get_slice(name)
            if list(whole.get_shape()) != list(parameter.shape):
                raise _differ(bundle, name, list(parameter.shape), list(whole.get_shape()))
            some = whole[:1] if parameter.ndim else stored.get_tensor(name)
            theirs = parameter.detach()[: len(some)] if parameter.ndim else parameter.detach()
            theirs, some = theirs.flatten()[:_SAMPLE].float().cpu(), some.flatten()[:_SAMPLE]
            tolerance = max(_TOLERANCES.get(dtype, 1e-6) for dtype in (parameter.dtype, some.dtype))
            if not torch.allclose(theirs, some.float(), rtol=tolerance, atol=tolerance * 1e-2, equal_nan=True):
                place = int((theirs - some.float()).abs().argmax())
                raise _differ(bundle, name, float(theirs[place]), float(some[place]))


def _differ(bundle: Bundle, name: str, found: Any, mine: Any) -> UsageError:
    weights = bundle.record.model.weights_sha256
    known = f" (weights {weights[:32]})" if weights else ""
    return UsageError(
        f"the denoiser's '{name}' ({found}) is not that of '{bundle.record.model.name}'{known}, which the bundle was "
        f"compiled from ({mine}); attach it to that model, or export this one"
    )
