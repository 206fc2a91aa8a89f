"""What a loss is made of, as an option says it: names and weights."""

from __future__ import annotations

LOSS_TERMS = ("latent", "psnr", "ssim", "l1", "l2")


def loss_terms(spec: str) -> list[tuple[float, str]]:
    """Return weights and names of the terms in a sum such as ``0.5*ssim+latent``; ValueError where it is none."""
    return [_loss_term(part) for part in spec.split("+")]


def _loss_term(part: str) -> tuple[float, str]:
    number, star, name = part.strip().rpartition("*")
    try:
        weight = float(number) if star else 1.0
    except ValueError:
        weight = -1.0
    if not 0 < weight < float("inf") or name.strip() not in LOSS_TERMS:
        raise ValueError(
            f"loss term '{part}' is unknown; use a sum of {', '.join(LOSS_TERMS)}, such as 0.5*ssim+latent"
        )
    return weight, name.strip()


def is_loss(spec: str) -> str:
    loss_terms(spec)
    return spec
