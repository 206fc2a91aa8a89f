"""The VAE decoder as ONNX: latent to pixels."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import nn

from export.bundle import DecoderRecord
from export.convert import convert, tensor_record

FILE = "vae_decoder.onnx"


class _Decoder(nn.Module):
    """``latent [B, C, H, W]`` to pixels ``[B, channels, height, width]`` in [0, 1], as diffusers pipelines do."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        pixels = self.vae.decode(latent / self.vae.config.scaling_factor, return_dict=False)[0]
        return (pixels / 2 + 0.5).clamp(0, 1)


def decoder_to_onnx(vae: Any, latent_shape: tuple[int, ...]) -> ir.Model:
    """Convert a diffusers ``AutoencoderKL``'s decoder, its weights inside the graph."""
    model = convert(
        "the VAE decoder", _Decoder(vae.eval()), [torch.zeros(latent_shape)], ["latent"], ["pixels"], optimize=True
    )
    ClearMetadataAndDocStringPass()(model)
    model.graph.name = "vae_decoder"
    model.producer_name = "dipgo"
    return model


def decoder_record(model: ir.Model) -> DecoderRecord:
    """Describe the decoder for ``bundle.json``."""
    return DecoderRecord(
        file=FILE, input=tensor_record(model.graph.inputs[0]), output=tensor_record(model.graph.outputs[0])
    )
