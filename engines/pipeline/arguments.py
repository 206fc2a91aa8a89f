"""What a call of a diffusers pipeline may ask of a bundle, and one line that names both values where it cannot have it.

A bundle is compiled for one sampler and step count, for sizes and guidance of a range. Another choice is refused, never
approximated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dipgo.base.errors import UsageError
from engines.guidance import Guidance, check_guidance
from engines.pipeline.control import ARGUMENTS as CONTROL
from engines.pipeline.control import check_control
from export.records.bundle import BundleRecord

MICRO_CONDITIONS = "time_ids"
"""SDXL's condition of sizes and crops, six numbers: the original size, the crop's corner, the target size."""

Check = Callable[[BundleRecord, str, Any], None]


def check_arguments(record: BundleRecord, arguments: Mapping[str, Any]) -> None:
    """Refuse what differs from a bundle's own; None asks for nothing.

    Args:
        arguments: those of a diffusers pipeline by name. Those without an entry in :data:`CHECKS` are not looked at.

    Raises:
        UsageError: naming the argument, its value and the bundle's.
    """
    for name, value in arguments.items():
        if name in CHECKS and value is not None:
            CHECKS[name](record, name, value)


def check_scheduler(record: BundleRecord, scheduler: Any) -> None:
    """Refuse a diffusers scheduler of another class, or configured otherwise, than the bundle's.

    Entries that only one of both has are not compared: versions of diffusers differ in them.

    Raises:
        UsageError: naming both.
    """
    mine = record.sampler
    cure = f"give the pipeline diffusers.{mine.class_name}.from_config(…) of the bundle's sampler"
    if type(scheduler).__name__ != mine.class_name:
        raise UsageError(
            f"the pipeline's scheduler is {type(scheduler).__name__}, the bundle was compiled for {mine.class_name}; "
            f"{cure}, or search and export for this one"
        )
    for name, value in mine.config.items():
        theirs = scheduler.config.get(name, value)
        if _plain(theirs) != _plain(value):
            raise UsageError(
                f"the pipeline's scheduler has {name} = {theirs!r}, the bundle was compiled for {value!r}; {cure}"
            )


def _refusal(name: str, value: Any, mine: Any, cure: str = "ask for that, or export another bundle") -> UsageError:
    """Return the error for one value that is not the bundle's."""
    return UsageError(f"{name} = {value}, the bundle was compiled for {mine}; {cure}")


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value.tolist() if hasattr(value, "tolist") else value


def _steps(record: BundleRecord, name: str, value: Any) -> None:
    if value != record.sampler.steps:
        raise _refusal(name, value, record.sampler.steps)


def _negative(record: BundleRecord, name: str, value: Any) -> None:
    if value and not record.conditioning.guided:
        scale = record.sampler.guidance_scale
        raise UsageError(f"{name} is given, the bundle was compiled for guidance_scale = {scale}, without one")


def _timesteps(record: BundleRecord, name: str, value: Any) -> None:
    timesteps = [float(step) for step in value]
    if timesteps != record.sampler.timesteps:
        raise _refusal(name, _few(timesteps), _few(record.sampler.timesteps))


def _tokens(record: BundleRecord, name: str, value: Any) -> None:
    encoder = record.conditioning.encoder
    if encoder and value != encoder.tokenizers[-1].length:  # beside CLIP that of T5 is the last
        raise _refusal(name, value, encoder.tokenizers[-1].length)


def _only(*neutral: Any) -> Check:
    """Accept what diffusers does nothing with."""

    def check(record: BundleRecord, name: str, value: Any) -> None:
        plain = _plain(value)
        if not any(plain == each for each in neutral):
            raise _refusal(name, _few(plain), neutral[0] if neutral else None, "leave it out")

    return check


def _clip_skip(record: BundleRecord, name: str, value: Any) -> None:
    encoder = record.conditioning.encoder
    most = sum("." in output.name for output in encoder.outputs) if encoder else 0
    if value not in range(most + 1):
        raise _refusal(name, value, f"0 to {most}" if most else None, "give that, or embeddings")


def _pair(record: BundleRecord, name: str, value: Any) -> None:
    """Accept a size or place in pixels, where sizes are among the conditions."""
    if not any(tensor.name == MICRO_CONDITIONS for tensor in record.conditioning.inputs):
        raise UsageError(f"{name} is given, the model takes none; leave it out")
    plain = _plain(value)
    if not isinstance(plain, list) or len(plain) != 2 or not all(isinstance(side, int | float) for side in plain):
        raise UsageError(f"{name} = {_few(plain)}; give two numbers, of height and width")


def _scale(record: BundleRecord, name: str, value: Any) -> None:
    """Accept the name that the model's pipeline has for the scale; of the other, 1, which asks for no second pass."""
    own = record.conditioning.scale
    if name == own:
        check_guidance(record, Guidance(scale=value))
    elif record.conditioning.guided:
        raise UsageError(f"{name} = {value}; the model's pipeline calls it {own}: give that")
    elif value != 1:
        raise _refusal(name, value, 1.0, "leave it out")


def _any(record: BundleRecord, name: str, value: Any) -> None:
    """Accept everything: it makes no difference to a bundle."""


def _few(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(map(str, value[:4]))}{', …' if len(value) > 4 else ''}]"
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else f"{text[:60]}…"


CHECKS: dict[str, Check] = {
    "num_inference_steps": _steps,
    "guidance_scale": _scale,
    "negative_prompt": _negative,
    "negative_prompt_embeds": lambda record, name, value: _negative(record, name, True),
    "timesteps": _timesteps,
    "sigmas": _only(),
    "eta": _only(0.0),
    "guidance_rescale": lambda record, name, value: check_guidance(record, Guidance(rescale=value)),
    "padding_mask_crop": _only(),
    "masked_image_latents": _only(),
    "denoising_start": _only(),
    "denoising_end": _only(),
    "clip_skip": _clip_skip,
    "true_cfg_scale": _scale,
    "skip_guidance_layers": _only(),
    "mu": _only(),
    "joint_attention_kwargs": _only({}),
    "cross_attention_kwargs": _only({}),
    "attention_kwargs": _only({}),
    "ip_adapter_image": _only(),
    "ip_adapter_image_embeds": _only(),
    "use_clipped_model_output": _only(False),
    "original_size": _pair,
    "target_size": _pair,
    "crops_coords_top_left": _pair,
    "negative_original_size": _pair,
    "negative_target_size": _pair,
    "negative_crops_coords_top_left": _pair,
    "clean_caption": _only(False),
    "complex_human_instruction": _only(),
    "max_sequence_length": _tokens,
    "use_resolution_binning": _any,
    **dict.fromkeys(CONTROL, check_control),
    "guess_mode": _only(False),
}
"""How each argument of diffusers' text- and class-to-image pipelines is checked against a bundle."""
