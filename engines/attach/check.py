"""Whether a denoiser in memory is the one that a bundle was compiled from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from dipgo.base.errors import UsageError
from dipgo.model.families.controlnet import folders_of_nets
from dipgo.model.model import config_sha256
from engines.attach.changes import check_unchanged
from engines.pipeline.control import nets_of
from export.bundle import Bundle

_SAMPLE = 4096  # elements that are compared of each parameter
_TOLERANCES = {torch.float32: 1e-6, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}  # relative, two roundings


def check_denoiser(bundle: Bundle, denoiser: Any, parts: Sequence[Any] = ()) -> None:
    """Compare a denoiser's class, configuration and parameters with the bundle's, and refuse a changed one.

    One with ControlNets is looked at for changes in ``parts``, the modules that it was put together of.

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
    mine_nets, nets = nets_of(bundle.record), max(len(parts) - 1, 0)
    if mine_nets != nets:
        raise UsageError(
            f"the pipeline has {nets or 'no'} ControlNet{'s' * (nets > 1)}, the bundle was compiled with "
            f"{mine_nets or 'none'}; attach it to the pipeline that it came from, or export this one"
        )
    digest = _config_sha256(denoiser)
    if digest != mine.config_sha256:
        raise UsageError(
            f"the denoiser's configuration ({digest[:32]}) is not that of '{mine.name}' ({mine.config_sha256[:32]}), "
            "which the bundle was compiled from; attach it to that model"
        )
    adapter = next((name for name in denoiser.state_dict() if "lora_" in name), None)
    if adapter:
        raise UsageError(f"the denoiser has an adapter ('{adapter[:80]}'), the bundle was compiled without; unload it")
    for part in parts or [denoiser]:
        check_unchanged(part)
    parameters = dict(denoiser.named_parameters()) | dict(denoiser.named_buffers())
    prefixes = {folder: prefix for prefix, folder in folders_of_nets(nets).items()} if nets else {}
    prefixes |= dict.fromkeys(("unet", "transformer"), "")
    for file in bundle.record.files:
        folder = Path(file).parent.name
        if file.endswith(".safetensors") and folder in prefixes:
            _check_weights(bundle, file, prefixes[folder], parameters)


def _config_sha256(denoiser: Any) -> str:
    config = json.loads(denoiser.to_json_string())
    return config_sha256(type(denoiser), config)


def _check_weights(bundle: Bundle, file: str, prefix: str, parameters: dict[str, torch.Tensor]) -> None:
    with safe_open(bundle.folder / file, "pt") as file_tensors:
        for name in file_tensors.keys():  # noqa: SIM118 - not a mapping
            parameter = parameters.get(prefix + name)
            if parameter is None or parameter.is_meta or not parameter.is_floating_point():
                continue
            tensor = file_tensors.get_slice(name)
            if list(tensor.get_shape()) != list(parameter.shape):
                raise _differ(bundle, prefix + name, list(parameter.shape), list(tensor.get_shape()))
            mine = tensor[:1] if parameter.ndim else file_tensors.get_tensor(name)
            theirs = parameter.detach()[: len(mine)] if parameter.ndim else parameter.detach()
            tolerance = max(_TOLERANCES.get(dtype, 1e-6) for dtype in (parameter.dtype, mine.dtype))
            theirs, mine = theirs.flatten()[:_SAMPLE].float().cpu(), mine.flatten()[:_SAMPLE].float()
            if not torch.allclose(theirs, mine, rtol=tolerance, atol=tolerance * 1e-2, equal_nan=True):
                place = int((theirs - mine).abs().argmax())
                raise _differ(bundle, prefix + name, float(theirs[place]), float(mine[place]))


def _differ(bundle: Bundle, name: str, theirs: Any, mine: Any) -> UsageError:
    weights = bundle.record.model.weights_sha256
    identity = f" (weights {weights[:32]})" if weights else ""
    return UsageError(
        f"the denoiser's '{name}' ({theirs}) is not that of '{bundle.record.model.name}'{identity}, which the bundle "
        f"was compiled from ({mine}); attach it to that model, or export this one"
    )
