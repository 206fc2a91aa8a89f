"""A pipeline's VAE encoder as an ONNX graph: a picture to its latent's distribution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from torch.export import Dim

from dipgo.model.models import Model
from export.component_weights import bind_component, own_weights
from export.components import VAE, component_config, component_dtype, components_of, empty_component
from export.onnx.convert import convert, export_module, tensor_record
from export.onnx.weights import Weights
from export.records.bundle import EncoderRecord
from export.records.graphs import Size
from export.sizes import Sizes, pixels_of_cell

FILE = "vae_encoder.onnx"
_EXAMPLE_SIZE = 6  # of an axis; torch.export takes 0 and 1 for constants


def encoder_to_onnx(
    model: Model, sizes: Sizes, dtype: torch.dtype, weights: Weights | None = None
) -> tuple[ir.Model, EncoderRecord] | None:
    """Convert the VAE's encoder: pixels in [-1, 1] to ``mean`` and ``deviation`` of the latent, all float32.

    Pixels are ``[batch, channels, rows, cell, columns, cell]``: a picture as it lies, its sides in cells of the latent,
    so that ranges of sizes have the same axes in all graphs. It computes in ``dtype``, or in float32 where the
    pipeline does so. ``weights`` None takes the folder's own, as they are.

    Returns:
        The graph and its record; None for a pipeline without a VAE.

    Raises:
        DipgoError: a folder that is incomplete or damaged, or weights of another model or dtype.
    """
    if VAE not in components_of(model):
        return None
    vae, cell = empty_component(model, VAE, dtype), pixels_of_cell(model)
    rows, columns = (side // cell for side in model.family.pixels) if model.family.pixels else sizes.latent[2:]
    channels = int(component_config(model, VAE).get("in_channels", 3))
    shape: list[Size] = [sizes.latent[0], channels, rows, cell, columns, cell]
    example = torch.zeros([size if isinstance(size, int) else _EXAMPLE_SIZE for size in shape])
    free = {axis: Dim.AUTO for axis, size in enumerate(shape) if not isinstance(size, int)}
    what, module = "the VAE encoder", _Encoder(vae, component_dtype(model, VAE, dtype), model.family.from_vae)
    program = export_module(what, module, [example], (free,) if free else None)
    graph = convert(what, program, ["pixels"], ["mean", "deviation"], shape)
    bind_component(graph, "vae.", model, vae, weights or own_weights(model, VAE))
    graph.graph.name, graph.producer_name = "vae_encoder", "dipgo"
    mean, deviation = map(tensor_record, graph.graph.outputs)
    record = EncoderRecord(file=FILE, input=tensor_record(graph.graph.inputs[0]), mean=mean, deviation=deviation)
    return graph, record


class _Encoder(nn.Module):
    """A picture to its latent's mean and deviation as diffusers pipelines scale them, the network in ``dtype``."""

    def __init__(self, vae: Any, dtype: torch.dtype, from_vae: Callable[[torch.Tensor, Any], torch.Tensor]) -> None:
        super().__init__()
        self.vae, self.dtype, self.from_vae = vae, dtype, from_vae

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pictures = pixels.flatten(4, 5).flatten(2, 3).to(self.dtype)
        latent = self.vae.encode(pictures, return_dict=False)[0]
        mean, deviation = latent.mean.float(), latent.std.float()
        config, nothing = self.vae.config, torch.zeros_like(deviation)
        return self.from_vae(mean, config), self.from_vae(deviation, config) - self.from_vae(nothing, config)
