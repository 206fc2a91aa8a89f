"""CLIP score and FID through torchmetrics, for those who have the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dipgo.base import install
from dipgo.base.errors import DipgoError

_CURE = install.EVALUATE
_PICTURES = (".png", ".jpg", ".jpeg")


def clip_score(images: Sequence[Path], prompts: Sequence[str], weights: Path) -> float:
    """Return 100 times the mean cosine of image and prompt, at least 0, by a CLIP model (Hessel et al. 2021).

    Raises:
        DipgoError: torchmetrics is missing, or the folder holds no CLIP model.
    """
    try:
        from torchmetrics.multimodal.clip_score import CLIPScore  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise DipgoError(f"CLIP score needs torchmetrics; {_CURE}") from error
    try:
        metric: Any = CLIPScore(model_name_or_path=lambda: _clip(weights))
    except Exception as error:  # transformers raises many kinds for a folder that it cannot read
        raise DipgoError(f"{weights}: not a CLIP model ({' '.join(str(error).split())[:160]})") from error
    for path, prompt in zip(images, prompts, strict=True):
        metric.update(_pixels(path), prompt)
    return float(metric.compute())


def fid(images: Sequence[Path], real: Path, weights: Path) -> float:
    """Return the Fréchet Inception distance to the pictures in a folder; ``weights`` are torch-fidelity's Inception.

    Raises:
        DipgoError: a library is missing, the weights cannot be read, or there are no pictures.
    """
    pictures = sorted(path for path in real.rglob("*") if path.suffix.lower() in _PICTURES)
    if len(pictures) < 2:
        raise DipgoError(f"{real}: fewer than two pictures in it; give a folder of .png or .jpg")
    try:
        from torchmetrics.image.fid import (  # type: ignore[import-not-found,unused-ignore]
            FrechetInceptionDistance,
        )

        metric: Any = FrechetInceptionDistance(feature=2048, feature_extractor_weights_path=str(weights))
    except (ImportError, ModuleNotFoundError) as error:
        raise DipgoError(f"FID needs torchmetrics and torch-fidelity; {_CURE}") from error
    except Exception as error:  # torch raises many kinds for weights that it cannot read
        raise DipgoError(f"{weights}: not torch-fidelity's Inception ({' '.join(str(error).split())[:160]})") from error
    for path in pictures:
        metric.update(_pixels(path)[None], real=True)
    for path in images:
        metric.update(_pixels(path)[None], real=False)
    return float(metric.compute())


def _clip(folder: Path) -> tuple[Any, Any]:
    """Load a CLIP model and its processor from a folder alone.

    transformers 5 wraps projected features in a record, of which torchmetrics 1 does not know.
    """
    from transformers import CLIPModel, CLIPProcessor

    model: Any = CLIPModel.from_pretrained(folder, local_files_only=True)
    for name in ("get_image_features", "get_text_features"):
        setattr(model, name, _bare(getattr(model, name)))
    return model, CLIPProcessor.from_pretrained(folder, local_files_only=True)


def _bare(features: Callable[..., Any]) -> Callable[..., Any]:
    def bare(*inputs: Any, **options: Any) -> Any:
        output = features(*inputs, **options)
        return getattr(output, "pooler_output", output)

    return bare


def _pixels(path: Path) -> torch.Tensor:
    """Return a picture's pixels, uint8 ``[3, height, width]``."""
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB")).transpose(2, 0, 1).copy())
