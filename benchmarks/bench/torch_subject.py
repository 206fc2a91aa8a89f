"""The whole model in torch: the diffusers denoiser, its own scheduler, and a technique that is applied to it.

The loop is that of the diffusers pipelines, without their checks and bars: scale the input, call the denoiser on both
halves of guidance, step the scheduler.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.bench.inputs import TIMING_SEED, given_for, latent_shape
from benchmarks.bench.parity import conditions_in, decode_latents
from benchmarks.bench.reference import cast_pipeline, model_of, subnet_of
from benchmarks.bench.specs import TorchSpec
from benchmarks.bench.techniques import TECHNIQUES, Position
from dipgo.graph.exported import in_dtype
from dipgo.model.families import GuidedDenoiser, family_of
from export.bundle import open_bundle
from export.compiler import scheduler_of


class TorchSubject:
    """See :class:`benchmarks.bench.subjects.Subject`. On the GPU where torch has one, else on the CPU."""

    def __init__(self, spec: TorchSpec) -> None:
        if spec.threads:
            torch.set_num_threads(spec.threads)
        bundle = open_bundle(Path(spec.bundle), check_files=False)
        subnet, record = subnet_of(bundle), bundle.record
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        pipe = model_of(bundle, spec.model).pipeline()
        dtype = getattr(torch, record.dtype)
        self.pipe = pipe if dtype == torch.float32 else cast_pipeline(pipe, dtype)
        if self.device.type != "cpu":
            self.pipe.to(self.device)
        self.pipe.scheduler = self.scheduler = scheduler_of(subnet)
        self.steps_count = subnet.sampler.steps
        self.family = family_of(self.pipe)
        self.position = Position()
        self._reset = TECHNIQUES[spec.technique].apply(self.pipe, self.position)
        denoiser = getattr(self.pipe, self.family.component)
        self.guided = GuidedDenoiser(denoiser, in_dtype(self.family, dtype), subnet.sampler.guidance_scale)
        self.batch, *self.shape = latent_shape(record)
        self.conditioning, self.decodes = record.conditioning, record.decoder is not None
        threads = torch.get_num_threads()
        place = "CPU" if self.device.type == "cpu" else torch.cuda.get_device_name(self.device)
        self.label = f"torch {place}" + (f", {threads} thread{'s' * (threads > 1)}" if place == "CPU" else "")
        self.device_seconds: float | None = None
        self.graph_seconds: float | None = None
        self._noise = self._drawn(self.batch, TIMING_SEED)
        self._given = given_for(record.conditioning, self.batch)
        self._conditions = self._conditions_of(self._given)

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
        latents = self._run(self._noise, self._conditions_of(self._given))
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

    def made(self, start: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray | None]:
        chosen = np.arange(start, start + self.batch).clip(max=count - 1)
        given = given_for(self.conditioning, count)
        conditions = self._conditions_of([given[index] for index in chosen])
        latents = self._run(self._drawn(count, seed)[chosen], conditions)
        kept = min(self.batch, count - start)
        images = self._decoded(latents)[:kept] if self.decodes else None
        return latents.cpu().numpy()[:kept], images

    def macs(self) -> int:
        """Count what one trajectory computes, by torch's own counter, which knows attention by its products alone."""
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.utils.flop_counter import FlopCounterMode

        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            self._run(self._noise, self._conditions)
        return counter.get_total_flops() // 2 // (self.batch * (1 + self.guided.guided))

    def close(self) -> None:
        """Nothing is held that the process would not let go of."""

    def _run(self, noise: torch.Tensor, conditions: Any, after_step: Callable[[], None] | None = None) -> torch.Tensor:
        """Run the loop; float32 noise ``[B, C, H, W]`` to the final latents."""
        self._reset()
        scheduler = self.scheduler
        scheduler.set_timesteps(self.steps_count, device=self.device)
        latent = noise * scheduler.init_noise_sigma if self.family.scales_noise else noise
        with torch.no_grad():
            for timestep in scheduler.timesteps:
                self.position.timestep = float(timestep)
                sample = scheduler.scale_model_input(latent, timestep)
                epsilon = self.guided(sample, timestep.expand(len(sample)), conditions)
                latent = scheduler.step(epsilon, timestep, latent, return_dict=False)[0]
                if after_step:
                    after_step()
        return latent

    def _drawn(self, count: int, seed: int) -> torch.Tensor:
        noise = torch.randn([count, *self.shape], generator=torch.Generator().manual_seed(seed))
        return noise.to(self.device)

    def _conditions_of(self, given: list[Any]) -> Any:
        made = conditions_in(self.pipe, given, self.guided.guided)
        return {name: value.to(self.device) for name, value in made.items()}

    def _decoded(self, latents: torch.Tensor) -> np.ndarray:
        with torch.no_grad():
            return decode_latents(self.pipe.vae, latents).cpu().numpy()
