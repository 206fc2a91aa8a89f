"""Samplers as tables: a linear diffusers scheduler turned into coefficients, so that running it needs no scheduler.

With x_0 the initial noise and ε_k the model output of call k, every linear scheduler gives

    x_k = rows[k, 0] noise + Σ_{i<k} rows[k, i + 1] ε_i        (x_0 = init_noise_sigma · noise)

and the denoiser is called on ``input_scale[k] · x_k`` at ``timesteps[k]``. The table is read off the real scheduler
by running it once on basis vectors; a second run on random vectors checks that it is linear and draws no noise.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from dipgo.base.errors import UsageError, one_line
from dipgo.base.guidance import rescale_of
from dipgo.base.records import Passes, SamplerIdentity

ALIASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "dpm++2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "euler": ("EulerDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
}


@dataclass(frozen=True)
class Sampler:
    """A scheduler at a fixed number of steps.

    Attributes:
        name: class of the diffusers scheduler.
        config: its configuration.
        steps: how many the pipeline is asked for.
        timesteps: ``[calls]``, one per call of the denoiser.
        input_scale: ``[calls]`` float64, what the latent is multiplied by before each call.
        rows: ``[calls + 1, calls + 1]`` float64, the latent after k calls as a combination (module docstring).
        settings: what ``set_timesteps`` is given.
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
    pixels: tuple[int, int] | None = None
    passes: Passes = field(default_factory=Passes)

    @property
    def calls(self) -> int:
        return len(self.timesteps)

    def identity(self, guidance_scale: float) -> SamplerIdentity:
        """Return what a SubNet keeps of the sampler that it belongs to."""
        return SamplerIdentity(
            class_name=self.name,
            config=self.config,
            steps=self.steps,
            timesteps=list(self.timesteps),
            guidance_scale=guidance_scale,
            guidance_rescale=rescale_of(guidance_scale),
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
            f"sampler '{name or own}' cannot be made of the pipeline's configuration ({one_line(error)}); use "
            f"{', '.join(ALIASES)}"
        ) from error
    if scheduler is None:
        raise UsageError(f"unknown sampler '{class_name}'; use {', '.join(ALIASES)}, or a diffusers scheduler's name")
    return scheduler


def tabulate(
    scheduler: Any,
    steps: int,
    scales_noise: bool = True,
    settings: Mapping[str, Any] | None = None,
    begin: int | None = None,
) -> Sampler:
    """Read a scheduler's table off the scheduler itself.

    ``scales_noise`` says whether the pipeline multiplies the initial noise by ``init_noise_sigma`` (``DiTPipeline``
    forgets to; with a scheduler that needs it, its images are noise). ``settings`` are what the pipeline gives
    ``set_timesteps``, where that is more than the number of steps (sigmas, a shift by the image's size), ``begin`` what
    it gives ``set_begin_index``.

    Raises:
        UsageError: fewer than two steps, or a scheduler that draws noise, clips, or is otherwise not linear, or that
            does not fit the pipeline.
    """
    name = type(scheduler).__name__
    if steps < 2:
        raise UsageError(f"steps = {steps}: with one step there is nothing to reuse; give at least 2")
    run = _Run(scheduler, steps, settings or {"num_inference_steps": steps}, begin)
    try:
        return _table(run, scales_noise)
    except UsageError:
        raise
    except Exception as error:  # whatever a scheduler may say of another's ways
        raise UsageError(
            f"sampler {name} does not step as those do that are supported ({one_line(error)}); use {', '.join(ALIASES)}"
        ) from error


@dataclass(frozen=True)
class _Run:
    """A scheduler as a pipeline sets it."""

    scheduler: Any
    steps: int
    settings: Mapping[str, Any]
    begin: int | None

    @property
    def first_scale(self) -> float:
        return float(getattr(self.scheduler, "init_noise_sigma", 1.0))

    def start(self) -> None:
        try:
            self.scheduler.set_timesteps(**self.settings)
        except Exception as error:  # whatever a scheduler may say of its configuration
            raise UsageError(
                f"{type(self.scheduler).__name__} refuses {self.steps} steps: {one_line(error)}"
            ) from error
        if self.begin is not None:
            self.scheduler.set_begin_index(self.begin)


def _table(run: _Run, scales_noise: bool) -> Sampler:
    scheduler, steps, name = run.scheduler, run.steps, type(run.scheduler).__name__
    run.start()
    if not scales_noise and abs(run.first_scale - 1) > 1e-6:
        raise UsageError(f"{name} starts from scaled noise, which this pipeline does not do; use ddim, dpm++2m or pndm")
    timesteps = scheduler.timesteps.tolist()
    calls = len(timesteps)
    inputs, rows = _trajectory(run, np.eye(calls + 1))
    if not (np.isfinite(inputs).all() and np.isfinite(rows).all()):
        raise UsageError(f"sampler {name} makes values that are not finite as configured; use {', '.join(ALIASES)}")

    # One more run on other vectors: a table that explains it is the scheduler, one that does not is refused.
    vectors = np.random.default_rng(0).normal(scale=3, size=(calls + 1, 8))
    _, actual = _trajectory(run, vectors)
    if not _same(rows @ vectors, actual):
        _, again = _trajectory(run, vectors, seed=2)
        raise UsageError(
            f"sampler {name} draws noise at every step, which is not supported yet; use {', '.join(ALIASES)}"
            if not _same(again, actual)
            else f"sampler {name} is not linear as configured: it clips or thresholds; switch clip_sample and "
            f"thresholding off in its config, or use {', '.join(ALIASES)}"
        )
    with np.errstate(divide="ignore", invalid="ignore"):
        scales = inputs[:, 0] / rows[:-1, 0]
    return Sampler(
        name, _plain(scheduler.config), steps, tuple(float(t) for t in timesteps), scales, rows, run.settings
    )


def _plain(config: Any) -> dict[str, Any]:
    """Return the configuration without private and infinite entries: JSON has no infinity, and defaults restore it."""
    return {
        key: value
        for key, value in dict(config).items()
        if not key.startswith("_") and not (isinstance(value, float) and not math.isfinite(value))
    }


def _same(expected: np.ndarray, actual: np.ndarray) -> bool:
    return np.allclose(expected, actual, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


def _trajectory(run: _Run, vectors: np.ndarray, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Run the scheduler with ``vectors[0]`` as noise and ``vectors[k + 1]`` as the output of call k.

    ``seed`` is for the noise of its own that a scheduler may draw.

    Returns the inputs of the calls ``[calls, n]`` and the latents before and after them ``[calls + 1, n]``.
    """
    run.start()
    scheduler = run.scheduler
    images = torch.from_numpy(vectors)[:, None, :, None, None]  # some schedulers insist on [B, C, H, W]
    latent = images[0] * run.first_scale
    inputs, latents = [], [latent]
    accepts_generator = "generator" in inspect.signature(scheduler.step).parameters
    options = {"generator": torch.Generator().manual_seed(seed)} if accepts_generator else {}
    for call, timestep in enumerate(scheduler.timesteps):
        scales = hasattr(scheduler, "scale_model_input")
        inputs.append(scheduler.scale_model_input(latent, timestep) if scales else latent)
        latent = scheduler.step(images[call + 1], timestep, latent, **options).prev_sample.to(torch.float64)
        latents.append(latent)
    return torch.stack(inputs).flatten(1).numpy(), torch.stack(latents).flatten(1).numpy()
