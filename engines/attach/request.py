"""What a call of a pipeline with a bundle attached may ask for: what never reaches the denoiser is seen here alone."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import BoundArguments
from typing import Any

from dipgo.base.errors import UsageError
from dipgo.model.observed.observation import Observation
from dipgo.model.observed.request import PICTURES, tokens_of
from dipgo.model.observed.template import same
from engines.guidance import Guidance, check_guidance
from engines.pipeline.arguments import CHECKS, check_arguments
from engines.program import Program

# What reaches the denoiser as conditions, which it takes as they come, or not at all.
_THE_PIPELINES_OWN = (
    "max_sequence_length",
    "clip_skip",
    "clean_caption",
    "use_resolution_binning",
    "complex_human_instruction",
    "negative_prompt",
    "negative_prompt_embeds",
    "padding_mask_crop",
    "masked_image_latents",
    "original_size",
    "target_size",
    "crops_coords_top_left",
    "negative_original_size",
    "negative_target_size",
    "negative_crops_coords_top_left",
)
_FREE = ("self", "generator", "latents", "output_type", "return_dict", "batch_size", "height", "width")
_OF_PICTURES = ("image", "mask_image", "strength")
_SCALES = ("guidance_scale", "true_cfg_scale")
_WORDS_OF_FREE = ("prompt", "callback", "num_images", "num_videos")


def guidance_of(arguments: Mapping[str, Any], scale: str = "guidance_scale") -> Guidance:
    """Return what a call's arguments say of guidance, whose scale is by the argument ``scale``."""
    return Guidance(arguments.get(scale), arguments.get("guidance_rescale"))


def check_known(program: Program, arguments: Mapping[str, Any]) -> None:
    """Refuse a call of a pipeline that is known that asks for another image than the bundle's.

    Raises:
        UsageError: naming the argument, its value and the bundle's.
    """
    check_arguments(
        program.record, {name: value for name, value in arguments.items() if name not in _THE_PIPELINES_OWN}
    )


def check_observed(program: Program, seen: Observation, guidance: str, call: BoundArguments) -> None:
    """Refuse a call of a pipeline that was observed that asks for what it was not observed at.

    Prompts, noise and outputs are free; what nobody knows must be as it is by default.

    Args:
        guidance: the argument that guidance is by.
        call: with the defaults.

    Raises:
        UsageError: naming the argument, its value and the bundle's.
    """
    arguments, (height, width) = call.arguments, program.size
    program.latent_shape(1, (arguments.get("height") or height, arguments.get("width") or width))
    scale = arguments.get(guidance)
    if scale is not None and _heeds(seen, scale):
        check_guidance(program.record, Guidance(scale))
    if _is_guided_besides(seen, guidance, arguments):
        raise _refusal("true_cfg_scale", arguments["true_cfg_scale"], 1.0)
    check_known(program, {name: value for name, value in arguments.items() if name not in _SCALES})
    free = _OF_PICTURES if "strength" in arguments and program.record.start else ()
    for name, value in arguments.items():
        usual = call.signature.parameters[name].default
        if name == "max_sequence_length":
            usual = tokens_of(arguments["self"])
        is_free = name in free or _is_free(name) or (seen.pictures and name in PICTURES)
        if not is_free and value is not None and not same(value, {}) and not same(value, usual):
            raise _refusal(name, value, usual)


def _is_free(name: str) -> bool:
    """Whether an argument may be whatever it is: it reaches the denoiser, or was checked."""
    if name == "max_sequence_length":
        return False
    return name in (*CHECKS, *_FREE, *_SCALES) or any(word in name for word in _WORDS_OF_FREE)


def _heeds(seen: Observation, scale: float) -> bool:
    """Whether another guidance scale makes a difference: it is an input, or there are two passes, here or there."""
    return seen.embeds or seen.guide.passes > 1 or seen.guidance <= 1 < scale


def _is_guided_besides(seen: Observation, guidance: str, arguments: Mapping[str, Any]) -> bool:
    """Whether a call asks for passes of guidance in addition to the guidance that is an input of the denoiser."""
    negative = arguments.get("negative_prompt") is not None or arguments.get("negative_prompt_embeds") is not None
    return guidance != "true_cfg_scale" and (arguments.get("true_cfg_scale") or 1) > 1 and negative


def _refusal(name: str, value: Any, mine: Any) -> UsageError:
    text = " ".join(str(value).split())
    return UsageError(
        f"{name} = {text[:60]}, the bundle was compiled for {mine}; ask for that, or export another bundle"
    )
