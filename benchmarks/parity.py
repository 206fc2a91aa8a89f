"""Parity: whether a compiled program does what the real diffusers pipeline does under the same gates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

import engines
from benchmarks.progress import Bars, Progress, silent
from benchmarks.reference import model_of, subnet_of
from dipgo.families import family_of
from dipgo.gating import gated
from dipgo.records import Record
from engines import Program
from export.compiler import scheduler_of

TOLERANCE = 1e-4  # float32


class Parity(Record):
    """Relative errors ``||compiled - torch||_2 / ||torch||_2`` over all images; NaN or infinite never passes."""

    images: int
    seed: int
    relative_error_latent: float
    relative_error_image: float
    tolerance: float
    passed: bool


def verify(
    folder: Path, model: str | None = None, images: int = 2, seed: int = 0, progress: Progress | None = None
) -> Parity:
    """Measure the parity of a bundle with its model, which ``model`` finds if it lies elsewhere now.

    ``progress`` None shows bars.

    Raises:
        DipgoError: a damaged bundle, or a model that is not the one it was compiled from.
    """
    progress = progress or Bars()
    program = engines.load(folder)
    pipe = model_of(program.bundle, model).pipeline()
    with program:
        return measure(program, pipe, images, seed, progress)


def measure(program: Program, pipe: Any, images: int = 2, seed: int = 0, progress: Progress = silent) -> Parity:
    """Run a program and the pipeline that it was compiled from on the same noise and classes, and compare.

    Classes cycle through the model's labels. The pipeline gets the SubNet's own scheduler, for the time of the call.
    """
    classes = classes_of(program, images)
    expected_latents, expected_images = _pipeline(program, pipe, classes, seed, progress)
    latents, pixels = _program(program, classes, seed, progress)
    latent_error = relative_error(latents, expected_latents)
    image_error = relative_error(pixels, expected_images)
    return Parity(
        images=images,
        seed=seed,
        relative_error_latent=latent_error,
        relative_error_image=image_error,
        tolerance=TOLERANCE,
        passed=latent_error <= TOLERANCE and image_error <= TOLERANCE,
    )


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Return ``||actual - expected||_2 / ||expected||_2``, computed in float64."""
    difference = actual.astype(np.float64) - expected
    return float(np.linalg.norm(difference) / np.linalg.norm(expected.astype(np.float64)))


def classes_of(program: Program, count: int) -> list[int]:
    """Return ``count`` classes, cycling through the model's labels."""
    labels = sorted(set(program.record.conditioning.labels.values())) or [0]
    return [labels[index % len(labels)] for index in range(count)]


def _pipeline(
    program: Program, pipe: Any, classes: Sequence[int], seed: int, progress: Progress
) -> tuple[np.ndarray, np.ndarray]:
    """Return final latents ``[n, C, H, W]`` and images ``[n, height, width, channels]`` of the gated pipeline."""
    subnet = subnet_of(program.bundle)
    denoiser = getattr(pipe, family_of(pipe).component)
    held, pipe.scheduler = pipe.scheduler, scheduler_of(subnet)
    pipe.set_progress_bar_config(disable=True)
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1
        progress("verify: torch", calls, subnet.calls, "")

    progress("verify: torch", 0, subnet.calls, "")
    hook = denoiser.register_forward_hook(count)
    try:
        with gated(denoiser, subnet), _decoded(pipe.vae) as latents:
            images = pipe(
                list(classes),
                guidance_scale=subnet.sampler.guidance_scale,
                num_inference_steps=subnet.sampler.steps,
                generator=torch.Generator().manual_seed(seed),
                output_type="np",
            ).images
    finally:
        hook.remove()
        pipe.scheduler = held
    return torch.cat(latents).numpy(), images


@contextmanager
def _decoded(vae: Any) -> Iterator[list[torch.Tensor]]:
    """Collect the latents that ``vae.decode`` is given, in the scale of the denoiser."""
    original, latents = vae.decode, []

    def decode(latent: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        latents.append(latent * vae.config.scaling_factor)
        return original(latent, *args, **kwargs)

    vae.decode = decode
    try:
        yield latents
    finally:
        del vae.decode


def _program(program: Program, classes: Sequence[int], seed: int, progress: Progress) -> tuple[np.ndarray, np.ndarray]:
    """Return final latents and images of the compiled program, shaped as those of the pipeline."""
    noise = program.noise(len(classes), seed)
    latents, pixels = [], []
    for start in range(0, len(classes), program.batch):
        progress("verify: compiled", start, len(classes), "")
        chosen = np.arange(start, start + program.batch).clip(max=len(classes) - 1)
        latents.append(program.denoise(noise[chosen], program.class_conditions([classes[k] for k in chosen])))
        pixels.append(program.runner.decode(latents[-1]))
    progress("verify: compiled", len(classes), len(classes), "")
    count = len(classes)
    return np.concatenate(latents)[:count], np.concatenate(pixels)[:count].transpose(0, 2, 3, 1)
