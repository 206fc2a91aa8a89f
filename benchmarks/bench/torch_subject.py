"""The model that a bundle was compiled from, in torch, with a technique applied: measured as programs are."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.bench.reference import cast_pipeline, conditions_in, decode_latents, model_of, subnet_of
from benchmarks.bench.subjects import TIMING_SEED, Subject, TorchSpec, inputs_for, latent_shape
from benchmarks.bench.techniques import TECHNIQUES, Position
from dipgo.graph.exported import in_dtype
from dipgo.model.families import GuidedDenoiser, family_of, remember
from dipgo.model.noise_source import drawing
from engines.pipeline.formats import draw_noise
from engines.torchrt.runner import default_device
from export.bundle import open_bundle
from export.sources import scheduler_of


class TorchSubject(Subject):
    """The whole diffusers model, on the GPU where torch has one.

    The loop is that of the diffusers pipelines, without their checks and bars. ``pipe`` is the model's pipeline in
    float32 where it is loaded already; in half precision it stays as it is.
    """

    def __init__(self, spec: TorchSpec, pipe: Any = None) -> None:
        if spec.threads:
            torch.set_num_threads(spec.threads)
        bundle = open_bundle(Path(spec.bundle), check_files=False)
        subnet, record = subnet_of(bundle), bundle.record
        self.device = default_device()
        pipe = pipe or model_of(bundle, spec.model).pipeline()
        dtype = getattr(torch, record.dtype)
        self.pipe = pipe if dtype == torch.float32 else cast_pipeline(pipe, dtype)
        if self.device.type != "cpu":
            self.pipe.to(self.device)
        self.pipe.scheduler = self.scheduler = scheduler_of(subnet)
        self.steps_count = subnet.sampler.steps
        self.family = family_of(self.pipe)
        self.table = self.family.table(self.scheduler, self.steps_count)
        self.position = Position()
        self._bare = _with_bare_denoiser(self.pipe)
        self._reset = TECHNIQUES[spec.technique].apply(self.pipe, self.position)
        denoiser = self.family.denoiser(self.pipe)
        self.guided = GuidedDenoiser(denoiser, in_dtype(self.family, dtype), subnet.sampler.guidance)
        self.batch, *self.shape = latent_shape(record)
        self.conditioning, self.decodes, self.layout = record.conditioning, record.decoder is not None, record.noise
        threads = torch.get_num_threads()
        place = "CPU" if self.device.type == "cpu" else torch.cuda.get_device_name(self.device)
        self.label = f"torch {place}" + (f", {threads} thread{'s' * (threads > 1)}" if place == "CPU" else "")
        self._noise = self._noise_of(self.batch, TIMING_SEED)
        self._inputs = inputs_for(record.conditioning, self.batch)
        self._conditions = self._conditions_of(self._inputs)

    def loop(self) -> np.ndarray:
        if self.device.type == "cpu":
            return self._run(self._noise, self._conditions).numpy()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        latent = self._run(self._noise, self._conditions)
        end.record()
        torch.cuda.synchronize()
        self.device_seconds = begin.elapsed_time(end) / 1e3
        return latent.cpu().numpy()

    def pipeline(self) -> np.ndarray:
        latents = self._run(self._noise, self._conditions_of(self._inputs))
        return self._decoded(latents) if self.decodes else latents.cpu().numpy()

    def steps(self) -> list[float]:
        marks: list[float] = []

        def mark() -> None:
            if self.device.type != "cpu":
                torch.cuda.synchronize()
            marks.append(time.perf_counter())

        mark()
        self._run(self._noise, self._conditions, mark)
        return np.diff(marks).tolist()

    def generate(self, start: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray | None]:
        chosen = np.arange(start, start + self.batch).clip(max=count - 1)
        inputs = inputs_for(self.conditioning, count)
        conditions = self._conditions_of([inputs[index] for index in chosen])
        latents = self._run(self._noise_of(count, seed)[chosen], conditions)
        size = min(self.batch, count - start)
        images = self._decoded(latents)[:size] if self.decodes else None
        return latents.cpu().numpy()[:size], images

    def macs(self) -> int:
        """Count what one trajectory computes, by torch's own counter, which knows attention by its products alone."""
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.utils.flop_counter import FlopCounterMode

        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            self._run(self._noise, self._conditions)
        return counter.get_total_flops() // 2 // (self.batch * (1 + self.guided.guided))

    def _run(self, noise: torch.Tensor, conditions: Any, after_step: Callable[[], None] | None = None) -> torch.Tensor:
        """Run the loop; float32 noise, as :func:`~engines.pipeline.formats.draw_noise` has it, to the final latents."""
        self._reset()
        scheduler = self.scheduler
        scheduler.set_timesteps(**self.table.settings, device=self.device)
        initial, *drawn = noise.unbind(1) if self.table.draws else [noise]
        latent, left = initial * float(self.table.rows[0, 0]), iter(drawn)
        scales = hasattr(scheduler, "scale_model_input")
        with torch.no_grad(), drawing(type(scheduler), lambda *_, **__: next(left)):
            for moment, timestep in zip(self.table.timesteps, scheduler.timesteps, strict=True):
                self.position.timestep = float(timestep)
                sample = scheduler.scale_model_input(latent, timestep) if scales else latent
                epsilon = self.guided(sample, torch.full((len(sample),), moment, device=self.device), conditions)
                latent = scheduler.step(epsilon, timestep, latent, **self.table.options, return_dict=False)[0]
                if after_step:
                    after_step()
        return latent

    def _noise_of(self, count: int, seed: int) -> torch.Tensor:
        noise = draw_noise([count, *self.shape], seed, self.layout, self.table.draws)
        return torch.from_numpy(noise).to(self.device)

    def _conditions_of(self, inputs: list[Any]) -> Any:
        conditions = conditions_in(self._bare, inputs, self.guided.guided)
        return {name: value.to(self.device) for name, value in conditions.items()}

    def _decoded(self, latents: torch.Tensor) -> np.ndarray:
        with torch.no_grad():
            return decode_latents(self.pipe, latents).cpu().numpy()


def _with_bare_denoiser(pipe: Any) -> Any:
    """Return a copy of a pipeline whose denoiser no technique is applied to: some are run to see their conditions."""
    family, bare = family_of(pipe), copy.copy(pipe)
    denoiser = getattr(pipe, family.component)
    weights = {id(each): each for each in (*denoiser.parameters(), *denoiser.buffers())}  # which both share
    setattr(bare, family.component, copy.deepcopy(denoiser, weights))
    remember(bare, family)
    return bare
