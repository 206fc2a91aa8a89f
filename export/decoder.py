"""The VAE decoder as ONNX: latent to pixels."""

from __future__ import annotations

import io
import warnings
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import nn

from export.bundle import DecoderRecord, TensorRecord
from export.tapped import OPSET

FILE = "vae_decoder.onnx"


class _Decoder(nn.Module):
    """``latent [B, C, H, W]`` to pixels ``[B, channels, height, width]`` in [0, 1], as every diffusers pipeline does."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        pixels = self.vae.decode(latent / self.vae.config.scaling_factor, return_dict=False)[0]
        return (pixels / 2 + 0.5).clamp(0, 1)


def decoder_to_onnx(vae: Any, latent_shape: tuple[int, ...]) -> ir.Model:
    """Convert a diffusers ``AutoencoderKL``'s decoder, its weights inside the graph."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            _Decoder(vae.eval()),
            (torch.zeros(latent_shape),),
            dynamo=True,
            opset_version=OPSET,
            input_names=["latent"],
            output_names=["pixels"],
            verbose=False,
        )
    assert program is not None
    ClearMetadataAndDocStringPass()(program.model)
    stream = io.BytesIO()
    program.save(stream)  # detaches the weights from the torch module
    model = ir.from_proto(onnx.load_from_string(stream.getvalue()))
    model.graph.name = "vae_decoder"
    model.producer_name = "dipgo"
    return model


def decoder_record(model: ir.Model) -> DecoderRecord:
    """Describe the decoder for ``bundle.json``."""

    def tensor(value: ir.Value) -> TensorRecord:
        assert value.name is not None
        assert value.shape is not None
        assert value.dtype is not None
        shape = [int(size) for size in value.shape]
        return TensorRecord(name=value.name, dtype=str(value.dtype.numpy()), shape=shape)

    return DecoderRecord(file=FILE, input=tensor(model.graph.inputs[0]), output=tensor(model.graph.outputs[0]))
