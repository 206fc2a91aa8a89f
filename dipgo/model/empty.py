"""Networks with their buffers but with weights that were never read or allocated, for tracing and for watching."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn


def empty_module(
    module_class: Any, config: Mapping[str, Any], dtype_of: Callable[[str], torch.dtype] = lambda name: torch.float32
) -> Any:
    """Return a network of diffusers or transformers in evaluation mode, made of its configuration.

    Args:
        dtype_of: ``parameter's name -> dtype`` of those that are floating.
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        made_by = getattr(module_class, "config_class", None)  # transformers' classes have one
        parts = getattr(made_by, "sub_configs", {}).values()  # an encoder may be saved with its own part alone
        made_by = next((part for part in parts if getattr(part, "model_type", "") == config.get("model_type")), made_by)
        module = module_class(made_by.from_dict(dict(config))) if made_by else module_class.from_config(config)
    for path, part in module.named_modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            dtype = dtype_of(f"{path}.{name}" if path else name) if parameter.is_floating_point() else parameter.dtype
            # Pages of a fresh allocation that nobody touches take no memory, and unlike the meta device it does
            # not clash with the buffers that the constructor computes.
            setattr(part, name, nn.Parameter(torch.empty(parameter.shape, dtype=dtype), requires_grad=False))
    return module.eval()
