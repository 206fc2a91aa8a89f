"""Samplers as tables: a linear diffusers scheduler turned into coefficients, so that running it needs no scheduler.

With x_0 the initial noise and ε_k the model output of call k, every linear scheduler gives

    x_k = rows[k, 0] noise + Σ_{i<k} rows[k, i + 1] ε_i        (x_0 = init_noise_sigma · noise)

and the denoiser is called on ``input_scale[k] · x_k`` at ``timesteps[k]``. The table is read off the real scheduler
by running it once on basis vectors; a second run on random vectors checks that it is linear and draws no noise.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dipgo.base.errors import UsageError
from dipgo.base.records import SamplerIdentity

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
        steps: what ``set_timesteps`` was given.
        timesteps: ``[calls]``, one per call of the denoiser.
        input_scale: ``[calls]`` float64, what the latent is multiplied by before each call.
        rows: ``[calls + 1, calls + 1]`` float64, the latent after k calls as a combination (module docstring).
    """

    name: str
    config: dict[str, Any]
    steps: int
    timesteps: tuple[float, ...]
    input_scale: np.ndarray
    rows: np.ndarray

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
        )


def make_scheduler(name: str | None, base: Any) -> Any:
    """Return a scheduler by alias or class name, configured from the pipeline's own; None returns the pipeline's.

    Where the pipeline's own says nothing of ``clip_sample``, latents are not clipped, though DDIM's default is to: it
    is meant for pixels, and a pipeline without the setting was made for a scheduler that never does.

    Raises:
        UsageError: diffusers has no such scheduler, or it cannot be made.
    """
    import diffusers

    if name is None:
        return type(base).from_config(base.config)
    class_name, overrides = ALIASES.get(name.lower(), (name, {}))
    scheduler_class = getattr(diffusers, class_name, None)
    try:
        if scheduler_class is not None and hasattr(scheduler_class, "set_timesteps"):
            clips = "clip_sample" in inspect.signature(scheduler_class.__init__).parameters
            if clips and "clip_sample" not in base.config:
                overrides = overrides | {"clip_sample": False}
            return scheduler_class.from_config(base.config, **overrides)
    except (ImportError, TypeError, ValueError) as error:  # a package, or an argument, that is not there
        raise UsageError(
            f"sampler '{name}' cannot be made of the pipeline's configuration ({_short(error)}); use "
            f"{', '.join(ALIASES)}"
        ) from error
    raise UsageError(f"unknown sampler '{name}'; use {', '.join(ALIASES)}, or the name of a diffusers scheduler")


def tabulate(scheduler: Any, steps: int, scales_noise: bool = True) -> Sampler:
    """Read a scheduler's table off the scheduler itself.

    ``scales_noise`` says whether the pipeline multiplies the initial noise by ``init_noise_sigma`` (``DiTPipeline``
    forgets to; with a scheduler that needs it, its images are noise).

    Raises:
        UsageError: fewer than two steps, or a scheduler that draws noise, clips, or is otherwise not linear, or that
            does not fit the pipeline.
    """
    name = type(scheduler).__name__
    if steps < 2:
        raise UsageError(f"steps = {steps}: with one step there is nothing to reuse; give at least 2")
    if "FlowMatch" in name:
        raise UsageError(f"sampler {name} is for flow matching, which is not supported; use {', '.join(ALIASES)}")
    try:
        return _table(scheduler, steps, scales_noise)
    except (AttributeError, LookupError, NotImplementedError, TypeError, ValueError) as error:
        raise UsageError(
            f"sampler {name} does not step as those do that are supported ({_short(error)}); use {', '.join(ALIASES)}"
        ) from error


def _table(scheduler: Any, steps: int, scales_noise: bool) -> Sampler:
    name = type(scheduler).__name__
    _set_timesteps(scheduler, steps)
    if not scales_noise and abs(float(scheduler.init_noise_sigma) - 1) > 1e-6:
        raise UsageError(f"{name} starts from scaled noise, which this pipeline does not do; use ddim, dpm++2m or pndm")
    timesteps = scheduler.timesteps.tolist()
    calls = len(timesteps)
    inputs, rows = _trajectory(scheduler, steps, np.eye(calls + 1))
    scales = inputs[:, 0] / rows[:-1, 0]

    # One more run on other vectors: a table that explains it is the scheduler, one that does not is refused.
    vectors = np.random.default_rng(0).normal(scale=3, size=(calls + 1, 8))
    _, actual = _trajectory(scheduler, steps, vectors)
    expected = rows @ vectors
    if not np.allclose(expected, actual, rtol=1e-3, atol=1e-3 * np.abs(expected).max()):
        raise UsageError(
            f"sampler {name} is not linear as configured (it draws noise, clips or thresholds); use "
            f"{', '.join(ALIASES)}, or switch clip_sample, thresholding and eta off in its config"
        )
    return Sampler(name, _plain(scheduler.config), steps, tuple(float(t) for t in timesteps), scales, rows)


def _plain(config: Any) -> dict[str, Any]:
    """Return the configuration without private and infinite entries: JSON has no infinity, and defaults restore it."""
    return {
        key: value
        for key, value in dict(config).items()
        if not key.startswith("_") and not (isinstance(value, float) and not math.isfinite(value))
    }


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


def _set_timesteps(scheduler: Any, steps: int) -> None:
    try:
        scheduler.set_timesteps(steps)
    except (ValueError, IndexError) as error:
        raise UsageError(f"{type(scheduler).__name__} refuses {steps} steps: {error}") from error


def _trajectory(scheduler: Any, steps: int, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Run the scheduler with ``vectors[0]`` as noise and ``vectors[k + 1]`` as the output of call k.

    Returns the inputs of the calls ``[calls, n]`` and the latents before and after them ``[calls + 1, n]``.
    """
    _set_timesteps(scheduler, steps)
    images = torch.from_numpy(vectors)[:, None, :, None, None]  # some schedulers insist on [B, C, H, W]
    latent = images[0] * float(scheduler.init_noise_sigma)
    inputs, latents = [], [latent]
    accepts_generator = "generator" in inspect.signature(scheduler.step).parameters
    options = {"generator": torch.Generator().manual_seed(1)} if accepts_generator else {}
    for call, timestep in enumerate(scheduler.timesteps):
        inputs.append(scheduler.scale_model_input(latent, timestep))
        latent = scheduler.step(images[call + 1], timestep, latent, **options).prev_sample.to(torch.float64)
        latents.append(latent)
    return torch.stack(inputs).flatten(1).numpy(), torch.stack(latents).flatten(1).numpy()
