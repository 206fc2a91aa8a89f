"""What every test of a real model needs: a tiny class-conditional diffusers pipeline on disk."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """On models as small as these, threads cost more than they bring."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_dit(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A DiTPipeline folder with random weights: latent 4x8x8, images 16x16x3, 4 sites by layer, classes 0 to 2."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=8,
        patch_size=1,
        num_embeds_ada_norm=1000,
    )
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(16, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=16,
        scaling_factor=0.5,
    )
    for parameter in transformer.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # adaLN and biases away from their tidy start
    scheduler = DDIMScheduler(clip_sample=False)
    folder = tmp_path_factory.mktemp("models") / "tiny-dit"
    DiTPipeline(transformer.eval(), vae.eval(), scheduler).save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["id2label"] = {"0": "cat", "1": "dog", "2": "fox"}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return str(folder)
