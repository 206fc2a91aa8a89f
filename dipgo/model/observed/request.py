"""What a pipeline is asked for while it is watched."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from inspect import signature
from typing import Any

import numpy as np
import torch
from PIL import Image

from dipgo.base.guidance import ScaleArgument

_SIDE = 64  # of pictures, where nobody says another

PICTURES = ("image", "mask_image", "control_image", "_auto_resize")  # arguments of a call by which these are given
STEPS = 4  # that a pipeline is watched for, where their number does not matter
PROMPTS = ("a", "a red fox in the snow, and two dogs")


@dataclass(frozen=True)
class Request:
    """What a pipeline is asked for while it is watched.

    Attributes:
        guidance: the guidance scale; None leaves it to the pipeline.
        size: height and width of images in pixels; None leaves them to the pipeline.
        pictures: whether it is given pictures, drawn by the prompts, where it takes some.
    """

    guidance: float | None = None
    size: tuple[int, int] | None = None
    steps: int = STEPS
    prompts: tuple[Any, ...] = PROMPTS[:1]
    seed: int = 0
    pictures: bool = False

    def inputs(self, pipe: Any, component: str) -> dict[str, Any]:
        """Return the arguments of the pipeline's call; it may not take all of them."""
        scale = guidance_argument(pipe, component)
        given: dict[str, Any] = {
            "prompt": list(self.prompts),
            "batch_size": len(self.prompts),
            "num_inference_steps": self.steps,
            "generator": torch.Generator().manual_seed(self.seed),
            "output_type": "np",
        }
        if self.steps != 2:
            given["intermediate_timesteps"] = None  # Sana-Sprint's, which it takes for two steps only
        if tokens_of(pipe) < own_tokens_of(pipe):
            given["max_sequence_length"] = tokens_of(pipe)
        if layers := _layers_of(pipe, component):
            given["text_encoder_out_layers"] = layers
        if self.size:
            given |= {"height": self.size[0], "width": self.size[1], "max_area": self.size[0] * self.size[1]}
            given["use_resolution_binning"] = False  # images are of this size, not of the nearest that was trained on
        if self.guidance is not None:
            given[scale] = float(self.guidance)
            given["guidance_rescale"] = getattr(self.guidance, "rescale", 0.0)
        if self.pictures:
            size = self.size or (_SIDE, _SIDE)
            drawn = [picture(each, size) for each in self.prompts]
            given |= dict.fromkeys(("image", "control_image"), drawn if len(drawn) > 1 else drawn[0])
            given |= {"mask_image": [picture(each, size).convert("1").convert("L") for each in self.prompts]}
            given["_auto_resize"] = False
        if scale == "true_cfg_scale":
            given["negative_prompt"] = [""] * len(self.prompts)
        return given


def picture(subject: Any, size: tuple[int, int]) -> Image.Image:
    """Return a picture of noise, of a height and width, that depends on the subject alone."""
    generator = np.random.default_rng(zlib.crc32(str(subject).encode()))
    return Image.fromarray(generator.integers(0, 256, (*size, 3), np.uint8))


def guidance_argument(pipe: Any, component: str) -> ScaleArgument:
    """Return the argument that guidance is by: ``true_cfg_scale`` where there is one, and the denoiser takes none."""
    options = signature(type(pipe).__call__).parameters
    embedded = getattr(getattr(pipe, component).config, "guidance_embeds", False)
    true = options.get("true_cfg_scale")
    return (
        "true_cfg_scale"
        if true is not None and true.default and true.default > 1 and not embedded
        else "guidance_scale"
    )


def tokens_of(pipe: Any) -> int:
    """Return how many tokens a pipeline's texts have at most: as many as by default, or a limit of T5's or CogVideoX's.

    A folder whose T5 takes shorter texts says so in its tokenizer's ``model_max_length``. Other tokenizers do not
    count: that of CLIP beside T5 has a length of its own, and those of language models say what these can read. A
    denoiser whose table of positions is for fewer texts says so in its configuration.
    """
    parts = getattr(pipe, "components", {}).values()
    limits = [part.model_max_length for part in parts if part.__class__.__name__.startswith("T5Tokenizer")]
    tables = (getattr(getattr(part, "config", None), "max_text_seq_length", None) for part in parts)
    return min([own_tokens_of(pipe), *limits, *(length for length in tables if length)])


def own_tokens_of(pipe: Any) -> int:
    """Return how many tokens a pipeline's texts have where its call does not say another number."""
    option = signature(type(pipe).__call__).parameters.get("max_sequence_length")
    return option.default if option and isinstance(option.default, int) else 512


def _layers_of(pipe: Any, component: str) -> tuple[int, ...] | None:
    """Return which layers of a text encoder FLUX.2 reads where it has fewer than are read by default: the last ones."""
    option = signature(type(pipe).__call__).parameters.get("text_encoder_out_layers")
    config = getattr(getattr(pipe, "text_encoder", None), "config", None)
    if option is None or config is None:
        return None
    text = config.get_text_config()
    if max(option.default) <= text.num_hidden_layers:
        return None
    count = getattr(pipe, component).config["joint_attention_dim"] // text.hidden_size
    return tuple(range(text.num_hidden_layers + 1 - count, text.num_hidden_layers + 1))
