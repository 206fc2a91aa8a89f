"""Parity: whether a compiled program does what torch does under the same gates.

A float32 bundle is held against the real gated diffusers pipeline, called with classes or prompts. A bundle of half
precision, or one that holds no text encoder or no decoder, is held against the gated denoiser under the sampler's table
(:class:`dipgo.eager.trajectory.Trajectory`, which tests hold against the pipelines): pipelines in half precision draw
other noise and round x at every step, which the program does not.
"""

from __future__ import annotations

import copy
import inspect
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.bench.quality import latent_error
from benchmarks.bench.reference import (
    as_images,
    cast_pipeline,
    conditions_as_arrays,
    conditions_in,
    decode_latents,
    model_of,
    subnet_of,
)
from benchmarks.bench.subjects import Inputs, encodes, inputs_of
from dipgo.base.guidance import GuidanceScale
from dipgo.base.progress import Report, silent
from dipgo.base.records import Record
from dipgo.eager.gating import gated
from dipgo.eager.trajectory import Trajectory
from dipgo.graph.exported import in_dtype
from dipgo.model.families import GuidedDenoiser, family_of, remember
from dipgo.model.observed.request import Request
from dipgo.schedule.subnet import SubNet
from engines.finite import NotFinite
from engines.guidance import Guidance, check_guidance, is_off
from engines.pipeline.pipeline import load
from engines.program import Program
from engines.sizes import batches_of
from engines.torchrt.precision import full_float32
from export.sources import scheduler_of

TOLERANCE = 1e-4  # float32
_POSTPROCESSORS = ("safety_checker", "watermark")  # what a pipeline does to finished images; programs do not

Outputs = tuple[np.ndarray, np.ndarray]
"""Final latents ``[n, C, H, W]`` and images ``[n, height, width, channels]`` in [0, 1], float32."""


class Parity(Record):
    """Relative errors ``||compiled - torch||_2 / ||torch||_2`` over all images; NaN or infinite never passes.

    The tolerance of a half dtype is twice torch's own error in that dtype, plus that of float32: a program that is no
    less exact than torch is at most so far from it.
    """

    images: int
    seed: int
    dtype: str = "float32"
    relative_error_latent: float
    relative_error_image: float
    rounding_latent: float = 0.0  # of torch in this dtype, to torch in float32
    rounding_image: float = 0.0
    tolerance: float
    tolerance_image: float | None = None  # where it is not the latent's
    passed: bool
    torch_seconds: float | None = None  # that an image took under the same gates in torch, and compiled; both cold
    compiled_seconds: float | None = None

    def line(self) -> str:
        """Return the errors and what they may be, as text."""
        allowed = f"{self.tolerance:.0e}"
        if self.tolerance_image is not None:
            allowed = f"{self.tolerance:.1e} and {self.tolerance_image:.1e} ({self.dtype})"
        return (
            f"relative error {self.relative_error_latent:.1e} (latent), {self.relative_error_image:.1e} (image), "
            f"tolerance {allowed}"
        )


def verify(
    folder: Path,
    model: str | None = None,
    images: int = 2,
    seed: int = 0,
    progress: Report = silent,
    backend: str = "onnxruntime",
    guidance: float | None = None,
) -> Parity:
    """Measure the parity of a bundle with its model, which ``model`` finds if it lies elsewhere now.

    ``backend`` runs the program. Of several programs it is the one that is furthest off. ``guidance`` is a scale; None
    is each SubNet's own.

    Raises:
        DipgoError: a damaged bundle, or a model that is not the one it was compiled from.
    """
    program = load(folder, backend=backend)
    check_guidance(program.record, Guidance(guidance))
    pipe = model_of(program.bundle, model, guidance).pipeline()
    with program:
        alone = [own.unguided for own in program.programs if own.unguided and guidance is None]
        each = [measure(own, pipe, images, seed, progress, guidance) for own in (*program.programs, *alone)]
    return max(each, key=lambda parity: (not parity.passed, parity.relative_error_latent))


def measure(
    program: Program,
    pipe: Any,
    images: int = 2,
    seed: int = 0,
    progress: Report = silent,
    guidance: float | None = None,
) -> Parity:
    """Run a program and the float32 pipeline that it was compiled from on the same noise and classes or prompts.

    Classes and prompts cycle (:func:`~benchmarks.bench.subjects.inputs_for`). The pipeline runs as a copy that has the
    SubNet's own scheduler, for a program of half precision in that dtype, on the device where the pipeline is.
    """
    inputs, dtype = inputs_of(program, images), getattr(torch, program.record.dtype)
    begin = time.perf_counter()
    with full_float32():
        exact = _torch(program, pipe, inputs, seed, guidance, progress)
    torch_seconds = (time.perf_counter() - begin) / images
    if dtype == torch.float32:
        expected, rounding = exact, (0.0, 0.0)
    else:
        pipe = cast_pipeline(pipe, dtype)
        expected = _torch(program, pipe, inputs, seed, guidance, progress)
        rounding = _errors(expected, exact)
    embeddings = None if encodes(program) else pipe
    begin = time.perf_counter()
    try:
        errors = _errors(_program(program, embeddings, inputs, seed, guidance, progress), expected)
    except NotFinite:
        errors = math.nan, math.nan
    compiled_seconds = (time.perf_counter() - begin) / images
    judged = 1 if program.record.decoder is None and not program.makes_pixels else 2  # latents alone are no images
    tolerances = [2 * error + TOLERANCE if dtype != torch.float32 else TOLERANCE for error in rounding]
    return Parity(
        images=images,
        seed=seed,
        dtype=program.record.dtype,
        relative_error_latent=errors[0],
        relative_error_image=errors[1],
        rounding_latent=rounding[0],
        rounding_image=rounding[1],
        tolerance=tolerances[0],
        tolerance_image=tolerances[1] if dtype != torch.float32 else None,
        passed=all(error <= tolerance for error, tolerance in [*zip(errors, tolerances, strict=True)][:judged]),
        torch_seconds=torch_seconds,
        compiled_seconds=compiled_seconds,
    )


def _errors(actual: Outputs, expected: Outputs) -> tuple[float, float]:
    latent, image = (latent_error(mine, theirs) for mine, theirs in zip(actual, expected, strict=True))
    return latent, image


def _torch(program: Program, pipe: Any, inputs: Inputs, seed: int, guidance: float | None, progress: Report) -> Outputs:
    """Run the gated model in torch, in the way that the module's docstring names for this program."""
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1
        progress("verify: torch", calls, len(program.record.steps), "")

    progress("verify: torch", 0, len(program.record.steps), "")
    record = program.record
    pipelined = record.conditioning.kind != "nothing" and record.decoder is not None
    whole = record.dtype == "float32" and encodes(program) and pipelined
    hook = getattr(pipe, family_of(pipe).component).register_forward_hook(count)
    try:
        return (_pipeline if whole else _trajectory)(program, pipe, inputs, seed, guidance)
    finally:
        hook.remove()


def _pipeline(program: Program, pipe: Any, inputs: Inputs, seed: int, guidance: float | None) -> Outputs:
    """Call the gated pipeline itself."""
    subnet, family, pipe = subnet_of(program.bundle), family_of(pipe), copy.copy(pipe)
    remember(pipe, family)
    for name in _POSTPROCESSORS:
        if getattr(pipe, name, None) is not None:
            setattr(pipe, name, None)
    pipe.scheduler = scheduler_of(subnet)
    height, width = program.size
    request = Request(_scale(subnet, guidance), (height, width), subnet.sampler.steps, tuple(inputs), seed)
    options = request.inputs(pipe, family.component)
    options |= family.besides(pipe, inputs, program.size)
    options |= {"class_labels": inputs, "clean_caption": False, "use_resolution_binning": False}
    accepted = inspect.signature(pipe.__call__).parameters
    pipe.set_progress_bar_config(disable=True)
    guided = not is_off(program.record, Guidance(guidance))
    with gated(family.denoiser(pipe), subnet, guided=guided), _decoded(pipe) as latents:
        images = pipe(**{name: value for name, value in options.items() if name in accepted}).images
    return torch.cat(latents).cpu().numpy(), images


def _scale(subnet: SubNet, guidance: float | None) -> GuidanceScale:
    own = subnet.sampler.guidance
    return own if guidance is None else GuidanceScale(guidance, own.rescale)


def _trajectory(program: Program, pipe: Any, inputs: Inputs, seed: int, guidance: float | None) -> Outputs:
    """Run the gated denoiser under the sampler's table, in the pipeline's dtype, and decode with the pipeline's VAE."""
    subnet, trajectory = subnet_of(program.bundle), trajectory_of(program, pipe, guidance)
    noise = torch.from_numpy(program.noise(len(inputs), seed)).to(trajectory.device)
    made = conditions_in(pipe, inputs, trajectory.guided.guided)
    conditions = {name: value.to(trajectory.device) for name, value in made.items()}
    with torch.no_grad():
        latent = trajectory.gated(noise, conditions, subnet.gates, subnet.schedule.tensors())[-1]
        if program.record.decoder is None:
            return latent.cpu().numpy(), as_images(latent).cpu().numpy()
        return latent.cpu().numpy(), decode_latents(pipe, latent).cpu().numpy()


def trajectory_of(program: Program, pipe: Any, guidance: float | None = None) -> Trajectory:
    """Return the trajectory that a program was compiled from, in the dtype of the pipeline."""
    subnet, family = subnet_of(program.bundle), family_of(pipe)
    denoiser: Any = family.denoiser(pipe)
    sampler = family.table(scheduler_of(subnet), subnet.sampler.steps)
    guided = GuidedDenoiser(denoiser, in_dtype(family, denoiser.dtype), _scale(subnet, guidance))
    return Trajectory(guided, subnet.sites, sampler)


@contextmanager
def _decoded(pipe: Any) -> Iterator[list[torch.Tensor]]:
    """Collect the latents that the VAE is given, as the denoiser has them."""
    vae, from_vae = pipe.vae, family_of(pipe).from_vae
    original, latents = vae.decode, []

    def decode(latent: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        latents.append(from_vae(latent, vae.config))
        return original(latent, *args, **kwargs)

    vae.decode = decode
    try:
        yield latents
    finally:
        del vae.decode


def _program(
    program: Program, pipe: Any | None, inputs: Inputs, seed: int, guidance: float | None, progress: Report
) -> Outputs:
    """Run the compiled program; ``pipe`` makes the conditions of one that takes embeddings."""
    noise, count = program.noise(len(inputs), seed), len(inputs)
    latents, images = [], []
    for rows in batches_of(program.record, count):
        progress("verify: compiled", int(rows[0]), count, "")
        batch: Any = [inputs[row] for row in rows]
        conditions = (
            program.conditions(batch, guidance=Guidance(guidance))
            if pipe is None
            else conditions_as_arrays(pipe, batch, program.record, guidance)
        )
        latents.append(program.denoise(noise[rows], conditions))
        if program.record.decoder is None:  # the latents are the images
            images.append(as_images(torch.from_numpy(latents[-1])).numpy())
        else:
            images.append(program.decode(latents[-1]).transpose(0, 2, 3, 1))
    progress("verify: compiled", count, count, "")
    return np.concatenate(latents)[:count], np.concatenate(images)[:count]
