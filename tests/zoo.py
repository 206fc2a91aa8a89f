"""Pipelines, traces, converted models and bundles, each made once for all tests that ask for it.

Pipelines and bundles lie on disk, shared by all workers of a session: read them, and copy what you change. Traces and
converted models are shared within a worker. The kinds of pipeline are the keys of ``PIPELINES``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Container, Iterable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers import PixArtSigmaPipeline, StableDiffusionInpaintPipeline, StableDiffusionPAGPipeline
from filelock import FileLock

from dipgo.graph.trace import Trace
from dipgo.graph.trace import trace as traced_anew
from dipgo.model.models import Model, find_model
from dipgo.model.sampler import Sampler, make_scheduler
from dipgo.schedule.subnet import SubNet
from dipgo.searching.config import SearchConfig
from dipgo.searching.task import Task, make_task
from export.compiler import Prepared, prepare, write_bundle
from export.config import ExportConfig
from export.onnx.convert import convert
from export.records.bundle import BundleRecord
from export.sizes import sizes_for
from tests import models

PIPELINES: dict[str, Callable[[Path], Any]] = {
    "dit": models.tiny_dit,
    "sd": models.tiny_sd,
    "sd-v": partial(models.tiny_sd, prediction="v_prediction"),
    "sd-pag": partial(models.tiny_sd, prediction="v_prediction", pipeline=StableDiffusionPAGPipeline),
    "sd-inpaint": partial(
        models.tiny_sd, prediction="v_prediction", pipeline=StableDiffusionInpaintPipeline, in_channels=9
    ),
    "lcm": models.tiny_lcm,
    "sdxl": models.tiny_sdxl,
    "controlnet": models.tiny_controlled,
    "controlnets": partial(models.tiny_controlled, nets=2),
    "sdxl-controlnet": partial(models.tiny_controlled, sdxl=True),
    "pixart": models.tiny_pixart,
    "pixart-512": partial(models.tiny_pixart, sample_size=64),
    "pixart-1024": partial(models.tiny_pixart, sample_size=128),  # which takes sizes as conditions too
    "pixart-sigma": partial(models.tiny_pixart, sample_size=64, pipeline=PixArtSigmaPipeline),
    "sana": models.tiny_sana,
    "flux": models.tiny_flux,
    "flux-schnell": partial(models.tiny_flux, guided=False),
    "sd3": models.tiny_sd3,
    "sd3-16": partial(models.tiny_sd3, channels=16),  # with which diffusers inpaints
    "cogview4": models.tiny_cogview4,
    "bria": models.tiny_bria,
    "qwen": models.tiny_qwen,
    "unconditional": models.tiny_unconditional,
}
PIXELS = dict.fromkeys(("flux", "flux-schnell", "bria", "qwen"), (32, 32))  # their pipelines' own size is large
SITES = {  # of classes without sites of their own
    "sana": "transformer_blocks.*.attn1,transformer_blocks.*.attn2,transformer_blocks.*.ff",
    "unconditional": "down_blocks.*,up_blocks.*",
}
LEAST = {"pool": 2, "held_out": 2, "drops_on": 1, "backup_iterations": 1, "backup_warmup": 0, "batch": 1}
"""Settings of a search that takes seconds."""
ROOT = Path()  # of the session; set by tests/conftest.py


def some(cases: Iterable[tuple[Any, ...]], quick: Container[tuple[Any, ...]]) -> list[Any]:
    """Return cases as parameters of a test, of which all but the ``quick`` ones are marked slow."""
    return [pytest.param(*case, marks=() if case in quick else pytest.mark.slow) for case in cases]


def once(name: str, make: Callable[[Path], Any]) -> Path:
    """Return the folder ``name`` of the session, made by whichever worker asks for it first."""
    folder = ROOT / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    done = folder.with_name(f"{folder.name}.done")
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if not done.exists():
            make(folder)
            done.touch()
    return folder


def pipeline(kind: str) -> str:
    """Return the folder of a small diffusers pipeline with random weights."""
    return str(once(f"pipelines/tiny-{kind}", PIPELINES[kind]))


def model(kind: str) -> Model:
    return find_model(pipeline(kind), pixels=PIXELS.get(kind))


def guidance_of(kind: str) -> float:
    return 1.0 if kind in ("unconditional", "flux-schnell") else 4.0


@cache
def _trace(
    kind: str, sites: str | None, guidance: float, dtype: torch.dtype, size: tuple[int, int] | None, is_open: bool
) -> Trace:
    if kind == "sd-v":  # another scheduler alone
        return replace(_trace("sd", sites, guidance, dtype, size, is_open), model=model(kind))
    return traced_anew(model(kind), sites, guidance, dtype, size, is_open)


def trace(
    kind: str,
    sites: str | None = None,
    guidance: float | None = None,
    dtype: torch.dtype = torch.float32,
    size: tuple[int, int] | None = None,
    open_guidance: bool = False,
) -> Trace:
    """Trace a denoiser; without ``sites`` and ``guidance`` those that are usual for the kind."""
    guidance = guidance_of(kind) if guidance is None else guidance
    sites = None if sites == model(kind).family.granularity else sites
    return _trace(kind, sites or SITES.get(kind), guidance, dtype, size, open_guidance)


def task(
    kind: str,
    steps: int,
    sampler: str | None = None,
    sites: str | None = None,
    guidance: float | None = None,
    **options: Any,
) -> Task:
    """Return a search's task with a pipeline of its own; the trace is shared. ``options`` are those of make_task."""
    traced = trace(kind, sites, guidance)
    made = make_task(traced.model, steps, sampler, traced, traced.guidance_scale, **options)
    made.pipe.set_progress_bar_config(disable=True)
    return made


def search_config(steps: int, budget: Any = 0.5, **changes: Any) -> SearchConfig:
    """Return settings of a search with little of everything: drops, contenders, trials, backups that learn on."""
    little = {"batch": 2, "pool": 8, "held_out": 4, "drops": 3, "drops_on": 2, "contenders": 2, "width": 16}
    little |= {"trial_iterations": 2, "backup_iterations": 3, "gate_iterations": 2}
    return SearchConfig(**{"steps": steps, "budget": budget, **little, **changes})


@cache
def sampler(kind: str, steps: int, name: str | None = "ddim") -> Sampler:
    """Return a sampler's table for the pipeline; ``None`` is the pipeline's own."""
    pipe = model(kind).pipeline()
    return model(kind).at(guidance_of(kind)).family.table(make_scheduler(name, pipe.scheduler), steps)


_graphs: dict[Any, Any] = {}


def _graph_of(name: str, program: Any, *arguments: Any, **options: Any) -> Any:
    """Convert a denoiser to ONNX once, whatever sizes and components a converted model has beside."""
    if program not in _graphs:
        _graphs[program] = convert(name, program, *arguments, **options)
    return _graphs[program].clone()


@cache
def _converted(traced: Trace, batch: int | str, size: str | None, whole: bool, image: bool) -> Prepared:
    with mock.patch("export.onnx.denoiser_graph.convert", _graph_of):
        return prepare(traced, whole=whole, sizes=sizes_for(traced.model, batch, size), image=image)


def converted(
    traced: Trace, batch: int | str = 1, size: str | None = None, whole: bool = True, image: bool = False
) -> Prepared:
    """Convert a trace of :func:`trace`; ``batch`` and ``size`` may be ranges as on the command line."""
    return _converted(traced, batch, size, whole, image)


def bundle(
    traced: Trace,
    table: Sampler,
    subnet: SubNet,
    layout: str = "signature",
    batch: int | str = 1,
    size: str | None = None,
    whole: bool = True,
    image: bool = False,
) -> Path:
    """Return the bundle of a SubNet of a trace of :func:`trace`, written by whichever worker asks for it first."""
    facts = (table, traced.guidance_scale, traced.latent, traced.free, size, whole, image)
    digest = hashlib.sha256(repr(facts).encode())
    digest.update(repr([site.name for site in traced.sites]).encode() + subnet.gates.tobytes())
    digest.update(repr(traced.model.family.scales).encode())
    for name, weights in sorted(subnet.schedule.backups.items()):
        digest.update(repr((name, weights.shape)).encode() + weights.tobytes())
    dtype = str(traced.dtype).removeprefix("torch.")
    batch_name = str(batch).replace(":", "-")
    name = f"bundles/{traced.model.folder.name}-{dtype}-{layout}-{batch_name}-{digest.hexdigest()[:12]}"

    config = ExportConfig(graphs=layout, image=image)

    def write(folder: Path) -> BundleRecord:
        return write_bundle(converted(traced, batch, size, whole, image), subnet, table, folder, True, config)

    return once(name, write)
