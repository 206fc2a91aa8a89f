"""The pipelines of diffusers that start from a picture, by the text-to-image pipeline whose denoiser they run."""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import Any

from dipgo.base.errors import UsageError
from dipgo.base.records import read_object

OF_PICTURES = {
    "StableDiffusionPipeline": ("StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"),
    "StableDiffusionXLPipeline": ("StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"),
    "StableDiffusion3Pipeline": ("StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline"),
    "FluxPipeline": ("FluxImg2ImgPipeline", "FluxInpaintPipeline"),
}


def check_takes_pictures(folder: Path) -> None:
    """Refuse a pipeline's folder whose class nobody starts from pictures.

    Raises:
        UsageError: naming those that there are.
    """
    name = _class_of(folder)
    if name not in OF_PICTURES:
        raise UsageError(f"--image: {name} starts from noise alone; {', '.join(OF_PICTURES)} take pictures")


def usual_strengths(folder: Path) -> tuple[float, float]:
    """Return the strengths by default, with a picture and with a mask too, of the pipelines of a folder's class."""
    import diffusers

    calls = (signature(getattr(diffusers, name).__call__) for name in OF_PICTURES[_class_of(folder)])
    of_picture, of_mask = (float(call.parameters["strength"].default) for call in calls)
    return of_picture, of_mask


def _class_of(folder: Path) -> str:
    return str(read_object(folder / "model_index.json", "model_index.json").get("_class_name"))


def without_pictures(pipe: Any) -> Any:
    """Return the text-to-image pipeline of the same components; another pipeline than those above as it is.

    So is one whose denoiser reads the picture beside the latent (an inpainting UNet, of nine channels): there the
    picture is a condition, and the loop that of the pipeline itself.
    """
    import diffusers

    unet = getattr(pipe, "unet", None)
    if unet is not None and unet.config.in_channels != unet.config.out_channels:
        return pipe

    for text, others in OF_PICTURES.items():
        if type(pipe).__name__ in others:
            kind = getattr(diffusers, text)
            parts, wanted = pipe.components, kind._get_signature_keys(kind)[0]
            options = {"requires_safety_checker": False} if text == "StableDiffusionPipeline" else {}
            return kind(**{name: part for name, part in parts.items() if name in wanted}, **options)
    return pipe
