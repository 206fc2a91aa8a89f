"""Losses: against independent implementations, and with gradient through the decoder."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from dipgo.base.config import checked
from dipgo.searching.config import SearchConfig
from dipgo.searching.losses import final_latent, make_loss, ssim
from tests import zoo
from tests.checks import misused, refused


def pictures(seed, shape=(3, 2, 24, 17)):
    images = np.random.default_rng(seed).uniform(-1, 1, shape)
    return gaussian_filter(images, (0, 0, 1.5, 1.5)) * 3


def reference_ssim(first, second, span):
    """Wang et al. 2004 in float64: population statistics under scipy's truncated Gaussian, borders cropped."""

    def blur(image):
        return gaussian_filter(image, 1.5, truncate=3.5)[5:-5, 5:-5]

    scores = []
    for a, b in zip(first.reshape(-1, *first.shape[-2:]), second.reshape(-1, *second.shape[-2:]), strict=True):
        mean_a, mean_b = blur(a), blur(b)
        variances = blur(a * a) - mean_a**2 + blur(b * b) - mean_b**2
        covariance = blur(a * b) - mean_a * mean_b
        one, two = (0.01 * span) ** 2, (0.03 * span) ** 2
        scores.append(
            (2 * mean_a * mean_b + one) * (2 * covariance + two) / ((mean_a**2 + mean_b**2 + one) * (variances + two))
        )
    return np.mean(scores)


@pytest.mark.parametrize(("noise", "span"), [(0.01, 1.0), (0.3, 2.0), (2.0, 1.0)])
def test_ssim_is_that_of_wang_et_al(noise, span):
    first = pictures(0)
    second = first + noise * pictures(1)
    found = ssim(torch.from_numpy(first), torch.from_numpy(second), span).item()
    assert found == pytest.approx(reference_ssim(first, second, span), abs=1e-9)
    assert ssim(torch.from_numpy(first), torch.from_numpy(first)).item() == pytest.approx(1)
    with refused("11x11 or more, these are 10x12"):
        ssim(torch.zeros(1, 1, 10, 12), torch.zeros(1, 1, 10, 12))


def test_sums_of_terms():
    images = torch.from_numpy(pictures(0))
    target = torch.from_numpy(pictures(1))
    parts = {
        "ssim": 1 - reference_ssim(images.numpy(), target.numpy(), 2.0),
        "l1": np.abs(images.numpy() - target.numpy()).mean(),
        "l2": ((images.numpy() - target.numpy()) ** 2).mean(),
        "latent": np.mean(
            [((a - b) ** 2).mean() / (b**2).mean() for a, b in zip(images.numpy(), target.numpy(), strict=True)]
        ),
    }
    for name, value in parts.items():
        assert make_loss(name, lambda latent: latent)([images], [target]).item() == pytest.approx(value, rel=1e-6)
    both = make_loss("0.5*ssim + latent+ 2*l1", lambda latent: latent)([images], [target])
    assert both.item() == pytest.approx(0.5 * parts["ssim"] + parts["latent"] + 2 * parts["l1"], rel=1e-6)


def test_step_weights_mix_the_latents_on_the_way():
    latents, target = torch.rand(2, 4, 3, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    each = [final_latent([a], [b]) for a, b in zip(latents[1:], target[1:], strict=True)]
    loss = make_loss("latent", None, [0, 1, 3])
    assert loss(list(latents), list(target)).item() == pytest.approx((each[1].item() + 3 * each[2].item()) / 4)
    with pytest.raises(ValueError, match="shorter"):
        loss(list(latents[:3]), list(target[:3]))


@pytest.mark.parametrize("spec", ["ssim+l1", "l2", "latent", "0.5*ssim+latent"])
def test_gradient_passes_the_decoder(spec):
    """Against a central difference along one direction."""
    task = zoo.task("dit", 2)
    generator = torch.Generator().manual_seed(0)
    latent, target, direction = torch.randn(3, 2, 4, 8, 8, generator=generator)
    loss = make_loss(spec, task.decode)
    latent.requires_grad_()
    (gradient,) = torch.autograd.grad(loss([latent], [target]), latent)
    task.pipe.vae.double()
    with torch.no_grad():
        ahead, behind = (
            loss([(latent + step * direction).double()], [target.double()]).item() for step in (1e-4, -1e-4)
        )
    task.pipe.vae.float()
    assert (gradient * direction).sum().item() == pytest.approx((ahead - behind) / 2e-4, rel=1e-3)


@pytest.mark.parametrize("spec", ["", "ssim+", "mse", "x*ssim", "-1*l1", "0*l1", "nan*l1", "ssim*0.5"])
def test_specs_that_make_no_sense(spec):
    with misused("use a sum of latent, psnr, ssim, l1, l2"):
        checked(SearchConfig, {"steps": 4, "budget": 0.5, "loss": spec})
