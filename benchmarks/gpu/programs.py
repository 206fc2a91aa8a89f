"""Programs: a plan in a backend, built once and ready to be called."""

from __future__ import annotations

import gc
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.bundles import Bundles
from benchmarks.gpu.cases import EAGER, FULL, NEEDS_CUDA
from benchmarks.gpu.cut import cut, values_of
from benchmarks.gpu.ground import Ground, Plan
from benchmarks.gpu.loop import Loop, Signature, Step, captured, lay_out
from dipgo.base.errors import DipgoError, UsageError
from dipgo.graph.exported import in_dtype
from dipgo.model.families import GuidedDenoiser
from engines.backends import BACKENDS
from engines.pipeline.pipeline import load
from export.bundle import open_bundle

KEPT = 3  # programs held at once: a pair, and the baseline of the pair before or after it


class Unavailable(Exception):
    """This machine or installation lacks what a case needs; the message says what."""


@dataclass(frozen=True)
class Built:
    """A program ready to run.

    Attributes:
        run: runs one trajectory from the ground's noise and conditions; returns the final latent, a tensor on the
            device or an array.
        plan: what it does; None where that is not dipgo's to say.
        scope: what a call spans.
        on_events: whether it runs on torch's current CUDA stream.
        peak_bytes: device memory, weights included; None where it is not to be had.
    """

    run: Callable[[], Any]
    plan: Plan | None
    scope: str
    launches: int | None
    signatures: int | None
    on_events: bool
    peak_bytes: int | None
    seconds: float
    close: Callable[[], None]

    def latent(self) -> np.ndarray:
        """Run once; returns the final latent as float32 ``[B, C, H, W]``."""
        made = self.run()
        return np.asarray(made.float().cpu().numpy() if isinstance(made, torch.Tensor) else made, np.float32)


class Programs:
    """Builds programs of one ground, and keeps the last few."""

    def __init__(self, ground: Ground, bundles: Bundles) -> None:
        self.ground, self.bundles = ground, bundles
        self.cuda = ground.device.type == "cuda"
        self._built: OrderedDict[tuple[str, str], Built] = OrderedDict()
        self._steps: dict[tuple[Any, ...], Step] = {}

    def get(self, backend: str, program: str) -> Built:
        """Return a program, built and run once.

        Raises:
            Unavailable: the machine or the installation lacks what it needs.
        """
        key = (backend, program)
        if key in self._built:
            self._built.move_to_end(key)
            return self._built[key]
        if backend in NEEDS_CUDA and not self.cuda:
            raise Unavailable("needs CUDA")
        while len(self._built) >= KEPT:
            self.drop(next(iter(self._built)))
        self._built[key] = self._measured(backend, program)
        return self._built[key]

    def drop(self, key: tuple[str, str] | None = None) -> None:
        """Let a program go, or all of them, and hand its memory back."""
        for each in [key] if key else list(self._built):
            self._built.pop(each).close()
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def _measured(self, backend: str, program: str) -> Built:
        """Build and run once, with the time and the memory that this takes."""
        free = 0
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            free, _ = torch.cuda.mem_get_info()
        before = torch.cuda.memory_allocated() if self.cuda else 0
        started = time.perf_counter()
        built = self._build(backend, program)
        try:
            built.run()
            if self.cuda:
                torch.cuda.synchronize()
        except BaseException:
            built.close()
            raise
        seconds = time.perf_counter() - started
        peak = None
        if self.cuda and built.on_events:  # torch's own memory: exact, and the weights were there before
            weights = sum(value.nbytes for value in self.ground.denoiser.parameters())
            peak = torch.cuda.max_memory_allocated() - before + weights
        elif self.cuda:
            peak = free - torch.cuda.mem_get_info()[0]
        return Built(**{**vars(built), "seconds": seconds, "peak_bytes": peak})

    def _build(self, backend: str, program: str) -> Built:
        if backend in BACKENDS:
            return self._engine(backend, program)
        if program.startswith("deepcache-package-"):
            return self._deepcache_package(int(program.rpartition("-")[2]))
        plan = self.ground.plan(program)
        if backend in (EAGER, "diffusers-compile"):
            if program != FULL:
                raise UsageError(f"'{backend}' runs the full program alone")
            return self._own_code(plan, compiled=backend != EAGER)
        return self._cut(backend, plan)

    def _own_code(self, plan: Plan, compiled: bool) -> Built:
        """The model's own code, as it is or compiled by torch."""
        ground = self.ground
        guided = ground.guided
        if compiled:
            family = in_dtype(ground.model.family, ground.dtype)
            denoiser: Any = self._compile(ground.denoiser)
            guided = GuidedDenoiser(denoiser, family, ground.workload.guidance)
        names = list(ground.conditions)

        def step(latent: torch.Tensor, timestep: torch.Tensor, *given: torch.Tensor) -> Any:
            return guided(latent, timestep, dict(zip(names, given, strict=True))), ()

        return self._loop(plan, lambda signature: step, capture=False, compiled=compiled)

    def _cut(self, backend: str, plan: Plan) -> Built:
        """The traced graph, a module a signature: eager or compiled, step by step or as one CUDA graph."""
        compiled, capture = backend.startswith("compile"), backend in NEEDS_CUDA
        values = values_of(plan.trace, self.ground.denoiser, self.ground.device)
        terms = plan.subnet.terms if plan.subnet.weights else 0

        def make(signature: Signature) -> Step:
            key = (id(plan.trace), signature, terms, compiled)
            if key not in self._steps:
                module = cut(plan.trace, signature.served, signature.stored, terms, values, self.ground.device)
                self._steps[key] = self._compile(module) if compiled else module
            return self._steps[key]

        return self._loop(plan, make, capture, compiled)

    def _loop(self, plan: Plan, make: Callable[[Signature], Step], capture: bool, compiled: bool) -> Built:
        ground = self.ground
        launches = lay_out(plan.trace, plan.subnet)
        steps = {launch.signature: make(launch.signature) for launch in launches}
        loop: Any = Loop(plan.trace, plan.subnet, plan.sampler, launches, steps, len(ground.noise), ground.device)
        if capture:
            with torch.no_grad():
                loop = captured(loop, ground.noise, ground.conditions)

        def run() -> torch.Tensor:
            with torch.no_grad():
                result: torch.Tensor = loop(ground.noise, ground.conditions)
                return result

        scope = "denoising loop, latent to latent on the device"
        if compiled and not self.cuda:
            scope += "; torch.compile without a code generator"
        return Built(run, plan, scope, len(launches), len(steps), self.cuda, None, 0.0, lambda: None)

    def _compile(self, module: torch.nn.Module) -> Any:
        """Compile for these shapes; on the CPU without a code generator, which tries the path alone."""
        return torch.compile(module, dynamic=False, fullgraph=False, backend="inductor" if self.cuda else "eager")

    def _deepcache_package(self, interval: int) -> Built:
        """The package by DeepCache's authors around the model's own code, with the same linear solver."""
        try:
            from DeepCache import DeepCacheSDHelper  # type: ignore[import-untyped]
        except ImportError as error:
            raise Unavailable("the package DeepCache is not installed; run: pip install DeepCache") from error
        ground, plan = self.ground, self.ground.plan(FULL)
        timesteps = SimpleNamespace(timesteps=torch.tensor(plan.sampler.timesteps))
        helper = DeepCacheSDHelper(pipe=SimpleNamespace(unet=ground.denoiser, scheduler=timesteps))
        helper.set_params(cache_interval=interval, cache_branch_id=0)
        family, names = ground.model.family, list(ground.conditions)
        scale, dtype = ground.workload.guidance, ground.dtype

        def step(latent: torch.Tensor, timestep: torch.Tensor, *given: torch.Tensor) -> Any:
            sample = torch.cat([latent, latent]).to(dtype)
            # It looks the step up by the timestep's value, so it takes one number, not one a row.
            output = family.call(ground.denoiser, sample, timestep[0], dict(zip(names, given, strict=True))).float()
            unconditional, conditional = output.chunk(2)
            return unconditional + scale * (conditional - unconditional), ()

        built = self._loop(plan, lambda signature: step, capture=False, compiled=False)

        def run() -> Any:
            helper.enable()  # its wrappers may not lie around the denoiser when others run
            try:
                return built.run()
            finally:
                helper.disable()

        policy = self.ground.plan(f"deepcache-{interval}")
        return Built(**{**vars(built), "run": run, "plan": policy})

    def _engine(self, backend: str, program: str) -> Built:
        """A bundle in one of dipgo's own backends: host memory to host memory."""
        ground, plan = self.ground, self.ground.plan(program)
        folder = self.bundles.folder(program, plan)
        stack = ExitStack()
        try:
            if self.cuda:
                _make_ready(backend, folder, ground.device)
            loaded = stack.enter_context(load(folder, backend=backend))
        except (DipgoError, ImportError) as error:
            stack.close()
            raise Unavailable(" ".join(str(error).replace(f"{folder}: ", "").split())[:300]) from error
        noise = ground.noise.cpu().numpy()
        given = {name: value.cpu().numpy() for name, value in ground.conditions.items()}
        record = loaded.record
        return Built(
            run=lambda: loaded.denoise(noise, given),
            plan=plan,
            scope=f"denoising loop, latent to latent in the host's memory, {loaded.runner.label}",
            launches=sum(bool(step.launches) for step in record.steps),
            signatures=len(record.graphs),
            on_events=False,
            peak_bytes=None,
            seconds=0.0,
            close=stack.close,
        )


def _make_ready(backend: str, folder: Path, device: torch.device) -> None:
    """Build what a backend does not build by itself when it loads."""
    if backend == "tensorrt":
        from engines.trt.build import build

        build(open_bundle(folder))
    elif backend == "torch-aot":
        from engines.torchrt import aot

        aot.build(open_bundle(folder), device)
