"""One pipeline taken the whole way: found, traced, exported, run without the model, and held against diffusers."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.studies.dummy_record import Outcome
from dipgo.base.errors import DipgoError
from dipgo.base.records import read_object

STEPS = 5
KEPT = 0.5
SEED = 5
SAMPLERS = ("own", "unclipped", "dpm++2m", "euler")  # another than the pipeline's own where that one clips
CLOSE = 1e-3  # relative
STRENGTH = 0.6  # of pictures

Arrays = dict[str, np.ndarray]


class Way:
    """One pipeline's way; ``stage`` is where it is."""

    def __init__(self, folder: Path, inputs: Mapping[str, Any]) -> None:
        sides = [int(inputs[name]) for name in ("height", "width") if inputs.get(name)]
        self.folder, self.pixels = folder, (sides[0], sides[1]) if len(sides) == 2 else None
        self.subjects: list[Any] = [inputs.get("prompt") or "a red fox"]
        self.stage, self.sampler = "find", ""
        self.errors: dict[str, float] = {}

    def go(self, scratch: Path) -> Outcome:
        from dipgo.eager.gating import gated
        from dipgo.graph.trace import trace
        from dipgo.model.models import find_model
        from dipgo.schedule.schedule import Schedule
        from dipgo.schedule.search_record import SearchRecord
        from dipgo.schedule.subnet import make_subnet
        from export.compiler import compile_subnet
        from export.config import ExportConfig

        text = text_pipeline_of(self.folder)
        source = renamed(self.folder, text, scratch / "text") if text else self.folder
        model = find_model(str(source), pixels=self.pixels)
        scale = model.default_guidance
        model = model.at(scale, self.pixels if model.family.under else None)
        self.stage = "sampler"
        scheduler, table = self._table(model)
        self.stage = "trace"
        traced = trace(model, None if model.family.granularity else "block", scale)
        gates = np.random.default_rng(3).random((table.calls, len(traced.sites))) < KEPT
        gates[0] = True
        subnet = make_subnet(traced, table.identity(scale), Schedule(gates, {}), SearchRecord())
        self.stage = "export"
        record = compile_subnet(subnet, model, scratch / "bundle", ExportConfig(image=bool(text)))
        if model.family.whole:  # with its ControlNets, whose pictures are drawn by the prompts
            return self._verified(model, scratch / "bundle")
        self.stage = "diffusers"
        if model.family.conditioned_by == "class":
            self.subjects = [1]
        pipe = model.pipeline()
        pipe.scheduler = scheduler
        pipe.set_progress_bar_config(disable=True)
        start = 0
        if text:
            pipe, start = of_pictures(pipe, self.folder), first_step(record) * scheduler.order
        expected = self._images(model, pipe, record, gated(getattr(pipe, model.family.component), subnet, start))
        if not expected:  # its decoder has a name of its own
            return self._verified(model, scratch / "bundle")
        if text or (model.family.seen and model.family.seen.pictures):
            self.stage = "attach"
            made = self._images(model, pipe, record, attached(pipe, scratch / "bundle"))
            self.errors = {kind: _distance(made[kind], own) for kind, own in expected.items()}
            return "attached" if max(self.errors.values()) <= CLOSE else "wrong"
        conditions = self._conditions(model, pipe)
        self.stage = "run"
        return self._compare(scratch / "bundle", conditions, expected)

    def _verified(self, model: Any, bundle: Path) -> Outcome:
        from benchmarks.bench.parity import verify

        self.stage = "verify"
        parity = verify(bundle, str(self.folder), images=1)
        self.errors = {"latent": parity.relative_error_latent, "prompt": parity.relative_error_image}
        by: Outcome = "prompt" if model.family.whole else "embeddings"
        return by if parity.passed else "wrong"

    def _table(self, model: Any) -> Any:
        """Return the first scheduler of :data:`SAMPLERS` that is a table, and that table."""
        from dipgo.model.sampler import make_scheduler

        def scheduler(name: str) -> Any:
            own = make_scheduler(None if name in ("own", "unclipped") else name, model.scheduler)
            return own if name != "unclipped" else type(own).from_config(own.config, clip_sample=False)

        first: DipgoError | None = None
        for name in SAMPLERS:
            try:
                table = model.family.table(scheduler(name), STEPS)
                self.sampler = table.name
                return scheduler(name), table
            except DipgoError as error:
                first = first or error
        assert first is not None
        raise first

    def _images(self, model: Any, pipe: Any, record: Any, way: AbstractContextManager[Any]) -> Arrays:
        """Return what the pipeline makes within a context: images where bundles decode, and latents."""
        import torch

        from dipgo.model.observed.request import Request

        family, scale = model.family, model.default_guidance
        accepted = inspect.signature(type(pipe).__call__).parameters
        by_class = {"class_labels": self.subjects, "guidance_scale": scale} if family.conditioned_by == "class" else {}
        asked, pictures = (family.seen.asked, family.seen.pictures) if family.seen else (None, False)
        besides = {"use_resolution_binning": False, **by_class}
        if record.start:  # pictures are of the bundle's size
            besides["strength"] = STRENGTH
            asked, pictures = record.pixels or tuple(record.cell * side for side in record.latent.shape[-2:]), True
        request = Request(scale, asked, STEPS, tuple(self.subjects), SEED, pictures)
        decodes = record.decoder is not None or record.conditioning.kind == "nothing"
        images = {}
        with torch.no_grad(), way:
            for kind in [*["np"] * decodes, *["latent"] * (hasattr(pipe, "vae") and not by_class)]:
                given = request.inputs(pipe, family.component) | {"output_type": kind, **besides}
                made = pipe(**{name: value for name, value in given.items() if name in accepted})[0]
                images[kind] = np.asarray(made.float() if isinstance(made, torch.Tensor) else made)
        return images

    def _conditions(self, model: Any, pipe: Any) -> Arrays:
        from dipgo.model.families import join

        if model.family.conditioned_by == "nothing":
            return {}
        unconditional, conditional = model.family.conditions(pipe, self.subjects)
        conditions = join(unconditional, conditional, model.family.guides(model.default_guidance))
        return {name: value.numpy() for name, value in conditions.items()}

    def _compare(self, folder: Path, conditions: Arrays, expected: Arrays) -> Outcome:
        """Run the bundle by embeddings, and by prompt where it takes prompts."""
        from engines.guidance import fixed_conditions
        from engines.pipeline.pipeline import load

        with load(folder) as bundle:
            bundle.set_progress_bar_config(disable=True)
            conditioning, best = bundle.record.conditioning, next(iter(expected))
            fixed = fixed_conditions(bundle.record, 1 + conditioning.guided)
            latent = bundle.denoise(bundle.noise(1, SEED), fixed | conditions)
            made = {"latent": lambda: latent, "np": lambda: bundle.decode(latent).transpose(0, 2, 3, 1)}
            self.errors |= {kind: _distance(made[kind](), own) for kind, own in expected.items()}
            if conditioning.encoder:
                negative = {"negative_prompt": ""} if conditioning.scale == "true_cfg_scale" else {}
                asked: dict[str, Any] = {"generator": SEED, "output_type": best, **negative}
                images = bundle(self.subjects, **asked).images
                self.errors["prompt"] = _distance(images, expected[best])
        judged = [error for kind, error in self.errors.items() if kind in (best, "prompt")]
        if not max(judged) <= CLOSE:
            return "wrong"
        return "embeddings" if conditioning.kind == "prompt" and not conditioning.encoder else conditioning.kind


def text_pipeline_of(folder: Path) -> str | None:
    """Return the text-to-image pipeline whose bundles a folder's own starts from pictures with; None where none is."""
    from dipgo.model.families.pictures import OF_PICTURES

    index = read_object(folder / "model_index.json", "model_index.json")
    unet = folder / "unet" / "config.json"
    config = read_object(unet, "configuration") if unet.exists() else {}
    refines = index.get("requires_aesthetics_score")
    if refines or config.get("in_channels") != config.get("out_channels"):  # it reads the picture beside the latent
        return None
    return next((text for text, others in OF_PICTURES.items() if index.get("_class_name") in others), None)


def renamed(folder: Path, name: str, place: Path) -> Path:
    """Return a folder of the same parts for another class of pipeline."""
    place.mkdir()
    for part in folder.iterdir():
        (place / part.name).symlink_to(part)
    index = read_object(folder / "model_index.json", "model_index.json") | {"_class_name": name}
    (place / "model_index.json").unlink()
    (place / "model_index.json").write_text(json.dumps(index))
    return place


def of_pictures(pipe: Any, folder: Path) -> Any:
    """Return a folder's own pipeline of the parts of its text-to-image pipeline."""
    import diffusers

    name = read_object(folder / "model_index.json", "model_index.json")["_class_name"]
    kind = getattr(diffusers, name)
    parts = {name: part for name, part in pipe.components.items() if name in kind._get_signature_keys(kind)[0]}
    made = kind(**parts, **({"requires_safety_checker": False} if "safety_checker" in parts else {}))
    made.set_progress_bar_config(disable=True)
    return made


def first_step(record: Any) -> int:
    """Return the step that trajectories begin at, as diffusers' pipelines round it."""
    done = STEPS * STRENGTH
    return STEPS - int(done) if record.start.rounds == "down" else int(STEPS - done)


@contextmanager
def attached(pipe: Any, bundle: Path) -> Iterator[None]:
    """Run a pipeline around a bundle: pictures are the pipeline's own affair."""
    from engines.attach.pipeline import attach, detach

    attach(pipe, bundle)
    try:
        yield
    finally:
        detach(pipe)


def _distance(made: Any, expected: np.ndarray) -> float:
    made = np.asarray(made)
    if made.size != expected.size:
        return float("inf")
    apart, whole = (float(np.linalg.norm(each)) for each in (made.reshape(expected.shape) - expected, expected))
    return apart / max(whole, 1e-12)
