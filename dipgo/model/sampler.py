"""Samplers as tables: a linear diffusers scheduler turned into coefficients, so that running it needs no scheduler.

With z the initial noise, z_j what the scheduler draws on its way, and ε_k the model output of call k, every linear
scheduler gives

    x_k = rows[k] · [z, z_1, …, z_draws, ε_0, …, ε_{k-1}, 0, …]        (x_0 = init_noise_sigma · z)

and the denoiser is called on ``input_scale[k] · x_k`` at ``timesteps[k]``. The table is read off the real scheduler
by running it once on basis vectors, which stand for what it draws too; a second run on random vectors checks that it
is linear.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from dipgo.base.errors import UsageError, one_line
from dipgo.base.guidance import rescale_of, spread_of
from dipgo.base.records import Passes, SamplerIdentity
from dipgo.model.scheduler_run import Run, combined, trajectory

ALIASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "dpm++2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "dpm++2m-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
}

_CURE = f"use {', '.join(ALIASES)}"


@dataclass(frozen=True)
class Sampler:
    """A scheduler at a fixed number of steps.

    Attributes:
        name: class of the diffusers scheduler.
        config: its configuration.
        steps: how many the pipeline is asked for.
        timesteps: ``[calls]``, one per call of the denoiser.
        input_scale: ``[calls]`` float64, what the latent is multiplied by before each call.
        rows: ``[calls + 1, 1 + draws + calls]`` float64, the latent after k calls as a combination (module docstring).
        settings: what ``set_timesteps`` is given.
        options: what ``step`` is given by name, beside a generator.
        pixels: height and width of the images that it is for; None where it is for all.
        passes: how the pipeline makes the passes of guidance, where that was observed.
    """

    name: str
    config: dict[str, Any]
    steps: int
    timesteps: tuple[float, ...]
    input_scale: np.ndarray
    rows: np.ndarray
    settings: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    pixels: tuple[int, int] | None = None
    passes: Passes = field(default_factory=Passes)

    @property
    def calls(self) -> int:
        return len(self.timesteps)

    @property
    def draws(self) -> int:
        """How often the scheduler draws noise of a latent's shape, after the initial noise and from its generator."""
        return self.rows.shape[1] - 1 - self.calls

    def identity(self, guidance_scale: float) -> SamplerIdentity:
        """Return what a SubNet keeps of the sampler that it belongs to."""
        return SamplerIdentity(
            class_name=self.name,
            config=self.config,
            steps=self.steps,
            timesteps=list(self.timesteps),
            guidance_scale=guidance_scale,
            guidance_rescale=rescale_of(guidance_scale),
            guidance_spread=spread_of(guidance_scale),
            pixels=self.pixels,
            passes=self.passes,
        )


@dataclass(frozen=True)
class SchedulerConfig:
    """A pipeline's own scheduler as its folder has it; its class may need a package that is not there."""

    class_name: str
    config: Mapping[str, Any]


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler, or its :class:`SchedulerConfig`, is for models that predict a flow."""
    own = scheduler.class_name if isinstance(scheduler, SchedulerConfig) else type(scheduler).__name__
    return own.startswith("FlowMatch") or scheduler.config.get("prediction_type") == "flow_prediction"


def make_scheduler(name: str | None, base: Any) -> Any:
    """Return a scheduler by alias or class name, configured from the pipeline's own; None returns the pipeline's.

    Where the pipeline's own says nothing of ``clip_sample``, latents are not clipped, though DDIM's default is to: it
    is meant for pixels, and a pipeline without the setting was made for a scheduler that never does.

    Args:
        base: the pipeline's scheduler, or its :class:`SchedulerConfig`.

    Raises:
        UsageError: diffusers has no such scheduler, or it cannot be made.
    """
    import diffusers

    own = base.class_name if isinstance(base, SchedulerConfig) else type(base).__name__
    class_name, overrides = (own, {}) if name is None else ALIASES.get(name.lower(), (name, {}))
    scheduler_class: Any = getattr(diffusers, class_name, None)
    try:
        known = hasattr(scheduler_class, "set_timesteps")
        options = inspect.signature(scheduler_class.__init__).parameters if known else {}
        if name is not None and "clip_sample" in options and "clip_sample" not in base.config:
            overrides = overrides | {"clip_sample": False}
        if own.startswith("FlowMatch") and "use_flow_sigmas" in options:
            overrides = overrides | {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
            overrides["flow_shift"] = base.config.get("shift", 1.0)
        scheduler = scheduler_class.from_config(base.config, **overrides) if known else None
        if known and name is not None and class_name != own and is_flow(base) != is_flow(scheduler):
            raise ValueError("the model predicts a flow, for which it is not made")
    except Exception as error:  # a package that is not there, or whatever a constructor says of its arguments
        raise UsageError(
            f"sampler '{name or own}' cannot be made of the pipeline's configuration ({one_line(error)}); {_CURE}"
        ) from error
    if scheduler is None:
        raise UsageError(f"unknown sampler '{class_name}'; {_CURE}, or a diffusers scheduler's name")
    return scheduler


def tabulate(
    scheduler: Any,
    steps: int,
    scales_noise: bool = True,
    settings: Mapping[str, Any] | None = None,
    begin: int | None = None,
    given: Mapping[str, Any] | None = None,
) -> Sampler:
    """Read a scheduler's table off the scheduler itself.

    ``scales_noise`` says whether the pipeline multiplies the initial noise by ``init_noise_sigma`` (``DiTPipeline``
    forgets to; with a scheduler that needs it, its images are noise). ``settings`` are what the pipeline gives
    ``set_timesteps``, where that is more than the number of steps (sigmas, a shift by the image's size), ``begin`` what
    it gives ``set_begin_index``, and ``given`` what it gives ``step`` by name: None is what Stable Diffusion's does, a
    generator and ``eta = 0``.

    Raises:
        UsageError: fewer than two steps, or a scheduler that clips, draws noise that no generator of the pipeline's
            determines, or is otherwise not linear, or that does not fit the pipeline.
    """
    name = type(scheduler).__name__
    if steps < 2:
        raise UsageError(f"steps = {steps}: with one step there is nothing to reuse; give at least 2")
    given = {"generator": torch.Generator(), "eta": 0.0} if given is None else given
    run = Run(scheduler, steps, settings or {"num_inference_steps": steps}, begin, given)
    try:
        return _table(run, scales_noise)
    except UsageError:
        raise
    except Exception as error:  # whatever a scheduler may say of another's ways
        raise UsageError(
            f"sampler {name} does not step as those do that are supported ({one_line(error)}); {_CURE}"
        ) from error


def _table(run: Run, scales_noise: bool) -> Sampler:
    scheduler, steps, name = run.scheduler, run.steps, type(run.scheduler).__name__
    run.start()
    if not scales_noise and abs(run.first_scale - 1) > 1e-6:
        raise UsageError(f"{name} starts from scaled noise, which this pipeline does not do; use ddim, dpm++2m or pndm")
    timesteps = scheduler.timesteps.tolist()
    calls = len(timesteps)
    still = trajectory(run, np.zeros((1 + calls, 1)), itertools.repeat(np.zeros(1)))
    if np.nan_to_num(still.latents).any():
        raise UsageError(f"sampler {name} draws noise in a way of its own, not from a generator; {_CURE}")
    seen = combined(run, np.eye(1 + still.draws + calls), still.draws)
    rows = seen.latents
    if not (np.isfinite(seen.inputs).all() and np.isfinite(rows).all()):
        raise UsageError(f"sampler {name} makes values that are not finite as configured; {_CURE}")

    # One more run on other vectors: a table that explains it is the scheduler, one that does not is refused.
    vectors = np.random.default_rng(0).normal(scale=3, size=(rows.shape[1], 8))
    expected, actual = rows @ vectors, combined(run, vectors, still.draws).latents
    if not np.allclose(expected, actual, rtol=1e-3, atol=1e-3 * np.abs(expected).max()):
        raise UsageError(
            f"sampler {name} is not linear as configured: it clips or thresholds; switch clip_sample and "
            f"thresholding off in its config, or {_CURE}"
        )
    largest = np.abs(rows[:-1]).argmax(axis=1)  # the noise may be all but gone
    scales = seen.inputs[range(calls), largest] / rows[range(calls), largest]
    config, moments = _plain(scheduler.config), tuple(float(t) for t in timesteps)
    options = {name: value for name, value in run.options.items() if name != "generator"}
    return Sampler(name, config, steps, moments, scales, rows, run.settings, options)


def _plain(config: Any) -> dict[str, Any]:
    """Return the configuration without private and infinite entries: JSON has no infinity, and defaults restore it."""
    return {
        key: value
        for key, value in dict(config).items()
        if not key.startswith("_") and not (isinstance(value, float) and not math.isfinite(value))
    }
