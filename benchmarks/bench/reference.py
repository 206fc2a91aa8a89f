"""What a bundle was compiled from: the diffusers model, and the search's task on it."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.bench.quality import Outputs, latents_as_images
from benchmarks.bench.subjects import IMAGE_SEED, Inputs, inputs_for, latent_shape
from benchmarks.bench.suite import Suite
from dipgo.base.errors import DipgoError
from dipgo.base.progress import Report, silent
from dipgo.model.families import Conditions, family_of, join, remember
from dipgo.model.models import Model, find_model
from dipgo.model.sampler import is_flow, make_scheduler
from dipgo.schedule.subnet import SubNet, load_subnet
from dipgo.searching.task import ALL_CHOICES, Choices, Task, make_task
from engines.guidance import Guidance, fixed_conditions
from engines.pipeline.formats import draw_noise
from export.bundle import Bundle
from export.records.bundle import BundleRecord
from export.sources import retrace, scheduler_of

CHUNK = 16  # images of the long trajectory at a time


def model_of(bundle: Bundle, name: str | None = None, guidance: float | None = None) -> Model:
    """Find the model that a bundle was compiled from; ``name`` says where it lies now, if elsewhere.

    It is as its pipeline uses it at a guidance scale; None is the SubNet's own.

    Raises:
        DipgoError: no such model, or one whose class, configuration or weights are not the bundle's.
    """
    mine = bundle.record.model
    try:
        sampler = bundle.record.sampler
        model = find_model(name or mine.name, bundle.record.random_weights, sampler.pixels)
        model = model.at(sampler.guidance if guidance is None else guidance, sampler.pixels)
    except DipgoError as error:
        if name:
            raise
        raise DipgoError(
            f"{bundle.folder}: the model it was compiled from is not to be had ({error}); say where it is with --model"
        ) from error
    theirs = model.identity()
    for what, expected, actual in (
        ("class", mine.class_name, theirs.class_name),
        ("configuration", mine.config_sha256, theirs.config_sha256),
        ("weights", mine.weights_sha256, theirs.weights_sha256),
    ):
        if expected is not None and expected != actual:
            raise DipgoError(
                f"{bundle.folder}: compiled from '{mine.name}', whose {what} ({expected[:32]}) is not that of "
                f"'{model.name}' ({str(actual)[:32]}); give the right --model, or export it again"
            )
    return model


def subnet_of(bundle: Bundle) -> SubNet:
    """Load the SubNet that a bundle carries."""
    return load_subnet(bundle.folder / bundle.record.subnet_file)


def task_of(bundle: Bundle, model: Model, progress: Report = silent) -> Task:
    """Load the pipeline, trace it, and return the task that the bundle's SubNet belongs to, its scheduler included."""
    return task_for(subnet_of(bundle), model, getattr(torch, bundle.record.dtype), progress=progress)


def task_for(
    subnet: SubNet,
    model: Model,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    choices: Choices = ALL_CHOICES,
    progress: Report = silent,
) -> Task:
    """Return the task that a SubNet belongs to, with the very scheduler that it was searched for."""
    sampler = subnet.sampler
    progress("load the model", 0, 2, "trace")
    traced = retrace(model, subnet, dtype)
    progress("load the model", 1, 2, "weights")
    task = make_task(model, sampler.steps, sampler.class_name, traced, sampler.guidance, device, choices)
    progress("load the model", 2, 2, "")
    task.pipe.scheduler = scheduler_of(subnet)
    return task.with_sampler(task.pipe.scheduler, sampler.steps)


def cast_pipeline(pipe: Any, dtype: torch.dtype) -> Any:
    """Return a copy of a float32 pipeline with its modules in ``dtype``, as ``from_pretrained(torch_dtype=dtype)`` has.

    Some parameters stay in float32, which the copy shares: those that a module's class names, and a VAE that the
    pipeline upcasts.
    """
    family = family_of(pipe)
    config = getattr(pipe, family.component).config
    cast = copy.copy(pipe)
    for name, module in pipe.components.items():
        if isinstance(module, nn.Module):
            upcast = name == "vae" and family.upcasts_vae(config) and getattr(module.config, "force_upcast", False)
            setattr(cast, name, module if upcast else _cast(module, dtype))
    remember(cast, family)
    return cast


def _cast(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    float32_names = set(getattr(module, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        float32_names |= set(getattr(module, "_keep_in_fp32_modules", None) or ())
    replaced: dict[int, Any] = {}  # what deepcopy takes in the place of a parameter or buffer
    for name, parameter in module.named_parameters():
        kind = torch.float32 if float32_names.intersection(name.split(".")) else dtype
        replaced[id(parameter)] = nn.Parameter(parameter.to(kind), requires_grad=False)
    for buffer in module.buffers():
        replaced[id(buffer)] = buffer.to(dtype) if buffer.is_floating_point() else buffer
    return copy.deepcopy(module, replaced)


def converged(task: Task, steps: int) -> Task:
    """Return a task under many steps of DDIM, which come close to where all solvers of the model's ODE converge.

    A flow's own solver is one of its ODE too. Else it is DDIM whatever the task's sampler is: with ``leading``
    timesteps some schedulers (DPM-Solver++ among them) begin a trajectory of 500 steps in the middle of the noise,
    because their stride is rounded down.
    """
    if is_flow(task.pipe.scheduler):
        return task.with_sampler(task.pipe.scheduler, steps)
    scheduler = make_scheduler("ddim", task.pipe.scheduler)
    scheduler.register_to_config(clip_sample=False)  # where the pipeline's own clips, but not the task's sampler
    return task.with_sampler(scheduler, steps)


def conditions_in(pipe: Any, inputs: Inputs, guided: bool) -> Conditions:
    """Return the denoiser's conditions as the pipeline makes them, or stand-ins, floats in the denoiser's dtype."""
    family = family_of(pipe)
    dtype = getattr(pipe, family.component).dtype
    with torch.no_grad():
        joined = join(*family.conditions(pipe, inputs), guided)
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in joined.items()}


def conditions_as_arrays(
    pipe: Any, inputs: Inputs, record: BundleRecord, guidance: float | None = None
) -> dict[str, np.ndarray]:
    """Return the conditions of a program that takes embeddings, in its dtypes."""
    conditioning = record.conditioning
    conditions = conditions_in(pipe, inputs, conditioning.guided)
    dtypes = {tensor.name: tensor.dtype for tensor in conditioning.inputs}
    arrays = {name: value.float().cpu().numpy().astype(dtypes[name]) for name, value in conditions.items()}
    return fixed_conditions(record, len(inputs) * (1 + conditioning.guided), Guidance(guidance)) | arrays


def decode_latents(pipe: Any, latents: torch.Tensor) -> torch.Tensor:
    """Decode latents ``[n, …]`` in the VAE's dtype; gives float32 ``[n, height, width, channels]`` in [0, 1]."""
    vae, to_vae = pipe.vae, family_of(pipe).to_vae
    assert to_vae is not None
    return as_images(vae.decode(to_vae(latents, vae.config).to(vae.dtype), return_dict=False)[0].float())


def as_images(decoded: torch.Tensor) -> torch.Tensor:
    """Return ``[n, channels, height, width]`` in [-1, 1] as ``[n, height, width, channels]``, clamped to [0, 1].

    Latents of other axes, packed or of frames, become grey pictures ``[n, …, last axis, 1]``.
    """
    clamped = (decoded / 2 + 0.5).clamp(0, 1)
    return clamped.permute(0, 2, 3, 1) if decoded.ndim == 4 else clamped.flatten(1, -2)[..., None]


def made_by_many_steps(task: Task, bundle: Bundle, count: int, suite: Suite, progress: Report) -> Outputs:
    """Run many steps of DDIM on the first of the judged noise, in torch."""
    steps = suite.converged_steps
    long = converged(task, steps)
    inputs = inputs_for(bundle.record.conditioning, suite.images)
    shape = [suite.images, *latent_shape(bundle.record)[1:]]
    device = task.trajectory.device
    noise = torch.from_numpy(draw_noise(shape, IMAGE_SEED, bundle.record.noise)).to(device)
    latents, images = [], []
    for start in range(0, count, CHUNK):
        progress(f"{steps} steps", start, count, "")
        end = min(start + CHUNK, count)
        with torch.no_grad():
            joined = join(*task.model.family.conditions(task.pipe, inputs[start:end]), task.trace.rows > 1)
            conditions = {name: value.to(device) for name, value in joined.items()}
            latents.append(long.trajectory.full(noise[start:end], conditions)[-1])
            if bundle.record.decoder is not None:
                images.append(as_images(task.decode(latents[-1])).cpu())
    progress(f"{steps} steps", count, count, "")
    final = torch.cat(latents).cpu().numpy()
    return Outputs(final, np.concatenate(images) if images else latents_as_images(final))
