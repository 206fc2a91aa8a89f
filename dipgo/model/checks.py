"""What a pipeline's folder must not hold: whatever changes its images, and that a traced denoiser would leave out."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from dipgo.base.errors import DipgoError, UsageError
from dipgo.base.safetensors_index import Stored

_LORA = "pytorch_lora_weights.safetensors"  # as save_lora_weights names it
_ADD_ONS = {"controlnet": "ControlNet", "adapter": "T2I-Adapter", "motion_adapter": "motion adapter"}
_OF_PICTURES = ("image", "mask_image", "control_image", "video", "strength")  # arguments of a pipeline's call
COMPONENTS = ("transformer", "unet")  # the attributes under which diffusers pipelines hold their denoisers
LIBRARIES = ("diffusers", "transformers")
SUPPORTED = "only text, class and unconditional generation are supported"


def component_class(index: Mapping[str, Any], name: str) -> tuple[str, str]:
    """Return the library and the class of a component as ``model_index.json`` has them; empty where there is none."""
    entry = index.get(name)
    if isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry):
        return entry[0], entry[1]
    return "", ""


def class_named(library: str, class_name: str, pipeline: str) -> Any:
    """Return a class of diffusers or transformers; None where there is none, or the library is another.

    A folder of diffusers' pipelines is a library too, as of Kolors. Some pipelines bring a class that their library
    does not show: it stands in their module.
    """
    import diffusers

    if library in LIBRARIES:
        shown = importlib.import_module(library)
    elif library.isidentifier() and isinstance(getattr(diffusers.pipelines, library, None), ModuleType):
        shown = getattr(diffusers.pipelines, library)
    else:
        return None
    kind = getattr(shown, class_name, None)
    own = sys.modules.get(getattr(getattr(diffusers, pipeline, None), "__module__", ""))
    return kind or getattr(own, class_name, None)


def check_index(
    index_file: Path, index: Mapping[str, Any], config: Mapping[str, Any], known: Collection[str] = ()
) -> None:
    """Refuse add-ons, and pipelines that start from pictures.

    Args:
        index: content of ``model_index.json``.
        config: the denoiser's configuration.
        known: add-ons that are part of the denoiser here.
    """
    own = {*known, *(["motion_adapter"] if component_class(index, "unet")[1] == "UNetMotionModel" else [])}
    for entry, what in _ADD_ONS.items():
        if entry not in own and component_class(index, entry)[0]:
            raise UsageError(f"{index_file}: has a {what}, which is not supported; save the pipeline without it")
    if config.get("encoder_hid_dim_type") == "ip_image_proj":
        raise UsageError(f"{index_file}: has an IP-Adapter, which is not supported; unload it and save again")
    if config.get("quantization_config"):
        raise UsageError(f"{index_file}: the denoiser is quantised, which is not supported; save it dequantised")
    if component_class(index, "vae")[1] == "ConsistencyDecoderVAE":
        raise UsageError(f"{index_file}: the VAE draws noise while it decodes, which is not supported")
    check_pipeline_class(str(index.get("_class_name")))


def check_pipeline_class(class_name: str) -> None:
    """Refuse a class of diffusers pipeline that starts on the way from a picture to noise; observing judges others."""
    import diffusers

    from dipgo.model.families.pictures import OF_PICTURES

    pictures = pictures_of(getattr(diffusers, class_name, None))
    if pictures.get("video") is not inspect.Parameter.empty and pictures.get("strength", 1.0) == 1.0:
        return
    text = next((text for text, others in OF_PICTURES.items() if class_name in others), None)
    cure = f"save its parts as a {text}, export that with --image, and attach to this one" if text else SUPPORTED
    raise UsageError(f"{class_name} starts from pictures ('{next(iter(pictures))}'); {cure}")


def pictures_of(pipeline: Any) -> dict[str, Any]:
    """Return the pictures that a class of pipeline takes, by argument, and their defaults.

    Where ``image`` alone is taken, None by default, a pipeline may do without: which shows when it is observed.
    """
    arguments = inspect.signature(pipeline.__call__).parameters if pipeline else {}
    return {name: arguments[name].default for name in _OF_PICTURES if name in arguments}


def check_latent(index_file: Path, config: Mapping[str, Any]) -> None:
    """Refuse a denoiser that is not a map from a latent ``[B, C, H, W]`` of known size to ε of the same size."""
    channels, out_channels = config.get("in_channels"), config.get("out_channels")
    missing = next((name for name in ("sample_size", "in_channels") if config.get(name) is None), None)
    if missing:
        raise UsageError(
            f"{index_file}: the denoiser's configuration has no {missing}: its latents are packed or of no size of "
            "its own, which is not supported"
        )
    if out_channels is not None and out_channels < channels:
        raise UsageError(
            f"{index_file}: the denoiser takes {channels} channels and makes {out_channels} (inpainting, depth, "
            f"upscaling); {SUPPORTED}"
        )


def check_lora(folder: Path, tensors: Mapping[str, Stored]) -> None:
    """Refuse a LoRA that is not fused: among the weights, or in diffusers' file for it, which no pipeline loads."""
    beside = folder / _LORA
    if beside.is_file():
        raise UsageError(
            f"{beside}: a LoRA that is not fused; call load_lora_weights() and fuse_lora() on the pipeline and save it "
            "elsewhere, or move the file away"
        )
    adapted = next((name for name in tensors if "lora_" in name or ".base_layer." in name), None)
    if adapted:
        raise UsageError(
            f"{tensors[adapted].file}: holds LoRA weights that are not fused ('{adapted[:60]}'); call fuse_lora() and "
            "unload_lora_weights() on the pipeline and save again"
        )


def refuse_pickled(folder: Path) -> None:
    """Refuse a pipeline of whose components one has pickled weights and no others."""
    for part in sorted(path for path in folder.iterdir() if path.is_dir()):
        pickled = sorted([*part.glob("*.bin"), *part.glob("*.ckpt")])
        if pickled and not list(part.glob("*.safetensors")):
            raise DipgoError(
                f"{pickled[0]}: pickled weights, which are not read; load the pipeline with diffusers and save it with "
                "save_pretrained(…, safe_serialization=True)"
            )
