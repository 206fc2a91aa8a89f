"""A pipeline's VAE decoder as an ONNX graph: latent to pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from torch.export import Dim

from dipgo.model.models import Model
from export.component_weights import bind_component, own_weights
from export.components import VAE, component_dtype, components_of, empty_component
from export.onnx.convert import convert, export_module, tensor_record
from export.onnx.weights import Weights
from export.records.bundle import DecoderRecord
from export.records.graphs import Size

FILE = "vae_decoder.onnx"
_EXAMPLE_SIZE = 6  # of an axis; torch.export takes 0 and 1 for constants


def decoder_to_onnx(
    model: Model, latent_shape: Sequence[Size], dtype: torch.dtype, weights: Weights | None = None
) -> tuple[ir.Model, DecoderRecord] | None:
    """Convert the VAE's decoder: ``latent [B, C, H, W]`` float32 to ``pixels [B, channels, height, width]`` float32.

    ``latent_shape`` has the name of an axis where a size is chosen at run time. Pixels are in [0, 1]. It
    computes in ``dtype``, or in float32 where the pipeline does so (:func:`component_dtype`). ``weights`` None takes
    the folder's own, as they are.

    Returns:
        The graph and its record; None for a pipeline without a VAE.

    Raises:
        DipgoError: a folder that is incomplete or damaged, or weights of another model or dtype.
    """
    to_vae = model.family.to_vae
    if VAE not in components_of(model) or to_vae is None:
        return None
    vae = empty_component(model, VAE, dtype)
    example = torch.zeros([size if isinstance(size, int) else _EXAMPLE_SIZE for size in latent_shape])
    free = {axis: Dim.AUTO for axis, size in enumerate(latent_shape) if not isinstance(size, int)}
    what, module = "the VAE decoder", _Decoder(vae, component_dtype(model, VAE, dtype), to_vae)
    program = export_module(what, module, [example], (free,) if free else None)
    graph = convert(what, program, ["latent"], ["pixels"], latent_shape)
    bind_component(graph, "vae.", model, vae, weights or own_weights(model, VAE))
    graph.graph.name, graph.producer_name = "vae_decoder", "dipgo"
    return graph, DecoderRecord(
        file=FILE, input=tensor_record(graph.graph.inputs[0]), output=tensor_record(graph.graph.outputs[0])
    )


class _Decoder(nn.Module):
    """Latent to pixels in [0, 1], as diffusers pipelines do it; scaling in float32, the network in ``dtype``."""

    def __init__(self, vae: Any, dtype: torch.dtype, to_vae: Callable[[torch.Tensor, Any], torch.Tensor]) -> None:
        super().__init__()
        self.vae, self.dtype, self.to_vae = vae, dtype, to_vae

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        pixels = self.vae.decode(self.to_vae(latent, self.vae.config).to(self.dtype), return_dict=False)[0]
        pixels = pixels.squeeze(2) if pixels.ndim == 5 else pixels  # of one frame
        return (pixels.float() / 2 + 0.5).clamp(0, 1)
