"""How far a gated trajectory is from the full one. Both are lists of latents after 0, 1, … calls.

Every loss is a mean over images, so that a batch in parts, over iterations or processes, gives the same gradient as
the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from dipgo.base.errors import DipgoError
from dipgo.searching.loss_terms import loss_terms

Loss = Callable[[list[torch.Tensor], list[torch.Tensor]], torch.Tensor]
Decode = Callable[[torch.Tensor], torch.Tensor]

SPAN = 2.0  # decoded images lie in [-1, 1]


def final_latent(latents: list[torch.Tensor], target: list[torch.Tensor]) -> torch.Tensor:
    """Squared error of the final latents, each image's relative to its mean square; mean over images."""
    return _relative(latents[-1], target[-1])


def make_loss(spec: str, decode: Decode | None = None, step_weights: Sequence[float] = ()) -> Loss:
    """Return a loss from a sum such as ``ssim+l1`` or ``0.5*ssim+latent``.

    Terms: ``latent``, relative squared error of latents; ``ssim``, 1 - SSIM, ``l1``, mean absolute, and ``l2``, mean
    squared error, of decoded final images (float32, [-1, 1]; the target is decoded without gradient); ``psnr``, the
    negative PSNR of the images as they are seen, clamped, in dB: every image counts alike, however far it is off, so
    few bad ones do not drown the gradient of the others.

    Args:
        decode: final latents to images, differentiable; needed for the image terms.
        step_weights: for ``latent``, one weight for the latent after every call, ``[calls]``; they are divided by
            their sum. Empty takes the final latent alone, as the paper takes the final image alone.
    """
    terms = loss_terms(spec)
    on_images = [(weight, name) for weight, name in terms if name != "latent"]
    assert decode is not None or not on_images, "image terms need a decoder"

    def loss(latents: list[torch.Tensor], target: list[torch.Tensor]) -> torch.Tensor:
        total = latents[-1].new_zeros(())
        for weight, name in terms:
            if name == "latent":
                total = total + weight * _latents(latents, target, step_weights)
        if on_images and decode is not None:
            with torch.no_grad():
                reference = decode(target[-1])
            images = decode(latents[-1])
            for weight, name in on_images:
                total = total + weight * _IMAGE_TERMS[name](images, reference)
        return total

    return loss


def ssim(images: torch.Tensor, reference: torch.Tensor, span: float = SPAN) -> torch.Tensor:
    """Return the mean structural similarity of two batches ``[B, C, H, W]`` (Wang et al. 2004, eq. 13).

    11x11 Gaussian window, sigma 1.5, where it lies wholly inside the image; C1 = (0.01 L)², C2 = (0.03 L)² with L =
    ``span``. The public code of DiP-GO takes L = 1 on images in [-1, 1], which makes its constants four times
    smaller.

    Raises:
        DipgoError: images smaller than the window.
    """
    if min(images.shape[-2:]) < 11:
        size = "x".join(map(str, images.shape[-2:]))
        raise DipgoError(f"SSIM needs images of 11x11 or more, these are {size}; use --set loss=l1 or latent")
    offsets = torch.arange(11, dtype=images.dtype, device=images.device) - 5
    window = torch.exp(-(offsets**2) / (2 * 1.5**2))
    window = window / window.sum()
    channels = images.shape[1]

    def blur(values: torch.Tensor) -> torch.Tensor:
        across = F.conv2d(values, window.view(1, 1, 1, 11).expand(channels, 1, 1, 11), groups=channels)
        return F.conv2d(across, window.view(1, 1, 11, 1).expand(channels, 1, 11, 1), groups=channels)

    first, second = (0.01 * span) ** 2, (0.03 * span) ** 2
    mean, mean_reference = blur(images), blur(reference)
    variance = blur(images * images) - mean**2
    variance_reference = blur(reference * reference) - mean_reference**2
    covariance = blur(images * reference) - mean * mean_reference
    luminance = (2 * mean * mean_reference + first) / (mean**2 + mean_reference**2 + first)
    return (luminance * (2 * covariance + second) / (variance + variance_reference + second)).mean()


def psnr(images: torch.Tensor, reference: torch.Tensor, span: float = SPAN) -> torch.Tensor:
    """Return each image's PSNR, 10 log10(span² / MSE) in dB, ``[B]``; images are clamped to [-span/2, span/2].

    70 dB at the most, which is more than 8-bit images can show: so a mean over images stays finite.
    """
    half = span / 2
    error = (images.clamp(-half, half) - reference.clamp(-half, half)).square().flatten(1).mean(1)
    return -10 * torch.log10(error / span**2 + 1e-7)


_IMAGE_TERMS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "psnr": lambda images, reference: -psnr(images, reference).mean(),
    "ssim": lambda images, reference: 1 - ssim(images, reference),
    "l1": lambda images, reference: (images - reference).abs().mean(),
    "l2": lambda images, reference: (images - reference).square().mean(),
}


def _relative(latent: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return ((latent - target).square().flatten(1).mean(1) / target.square().flatten(1).mean(1)).mean()


def _latents(latents: list[torch.Tensor], target: list[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    if not weights:
        return _relative(latents[-1], target[-1])
    triples = zip(weights, latents[1:], target[1:], strict=True)
    return torch.stack([weight * _relative(*pair) for weight, *pair in triples if weight]).sum() / sum(weights)
