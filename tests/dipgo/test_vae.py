"""Latents in two scales, for VAEs with a mean and deviation by channel, with a shift, and with a factor alone."""

from types import SimpleNamespace

import pytest
import torch

from dipgo.model.vae import from_vae, to_vae

MEAN, DEVIATION = [0.1, -0.2, 0.3, 0.0], [1.5, 0.5, 2.0, 1.0]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, lambda x: x / 0.18),
        ({"shift_factor": None, "latents_mean": None, "latents_std": None}, lambda x: x / 0.18),
        ({"shift_factor": 0.6}, lambda x: x / 0.18 + 0.6),
        (
            {"latents_mean": MEAN, "latents_std": DEVIATION},
            lambda x: torch.stack([x[:, c] * DEVIATION[c] / 0.18 + MEAN[c] for c in range(4)], 1),
        ),
    ],
)
def test_latents_go_to_the_vae_as_diffusers_scales_them_and_back(more, expected):
    config = SimpleNamespace(scaling_factor=0.18, **more)
    latents = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    scaled = to_vae(latents, config)
    assert torch.allclose(scaled, expected(latents), atol=1e-6)
    assert torch.allclose(from_vae(scaled, config), latents, atol=1e-6)
