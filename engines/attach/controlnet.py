"""What stands in the place of a pipeline's ControlNet while a bundle that holds it is attached."""

from __future__ import annotations

import copy
from typing import Any

import torch

from dipgo.base.control import PICTURE, STRENGTH
from dipgo.base.errors import UsageError

HANDED_ON = {"down_block_additional_residuals": PICTURE, "mid_block_additional_residual": STRENGTH}
"""The denoiser's arguments by which what the stand-in was given arrives there, and what each is."""


def handing_on(controlnet: Any) -> Any:
    """Return a ControlNet that computes nothing, and hands its pictures and scales on in the place of residuals.

    It shares the modules and configuration of the one that it stands for, since pipelines look at them.
    """
    stand_in = copy.copy(getattr(controlnet, "_orig_mod", controlnet))
    stand_in.forward = _hand_on
    return stand_in


def _hand_on(
    sample: torch.Tensor,
    timestep: Any,
    encoder_hidden_states: torch.Tensor,
    controlnet_cond: Any,
    conditioning_scale: Any = 1.0,
    guess_mode: bool = False,
    **others: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    if guess_mode:
        raise UsageError("guess_mode = True, the bundle was compiled without; leave it out, or call detach(pipe) first")
    pictures = controlnet_cond if isinstance(controlnet_cond, list | tuple) else [controlnet_cond]
    scales = conditioning_scale if isinstance(conditioning_scale, list | tuple) else [conditioning_scale]
    rows = sample.new_tensor([float(scale) for scale in scales], dtype=torch.float32).expand(len(sample), -1)
    return torch.cat(list(pictures), dim=1), rows[:, :, None, None]
