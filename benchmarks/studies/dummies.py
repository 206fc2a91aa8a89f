"""How many pipelines of a folder go end to end: found, traced, exported, run without the model, and equal to diffusers.

    python -m benchmarks.studies.dummies FOLDER --inputs inputs.json -o benchmarks/results/dummies.json

FOLDER holds pipelines, such as those of diffusers' own tests, each saved by ``save_pretrained``. ``--inputs`` has by
name what each is called with, of which height, width and prompt count. Every pipeline has a process of its own: a
random SubNet of half the sites is exported, and what its bundle makes by prompt, or else of embeddings, is compared
with the pipeline itself under the same gates.
"""

from __future__ import annotations

import inspect
import tempfile
import time
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.studies.study import StudyRecord
from dipgo.base.errors import DipgoError, one_line
from dipgo.base.records import Record, read_object

STEPS, KEPT, SEED = 5, 0.5, 5
SAMPLERS = (None, "dpm++2m", "euler")  # the pipeline's own; another where that one clips
CLOSE = 1e-3  # relative

Outcome = Literal["prompt", "embeddings", "class", "nothing", "refused", "wrong", "failed"]


class Row(Record):
    """A pipeline.

    Attributes:
        outcome: what it is run by; ``refused`` in one line, ``wrong`` by what it makes, ``failed`` otherwise.
        errors: relative distances of what was made: ``latent`` of embeddings, ``image`` of it decoded, ``prompt``.
        said: of a pipeline that is refused or fails, else what was warned of.
    """

    name: str
    pipeline: str
    outcome: Outcome
    stage: str
    sampler: str = ""
    errors: dict[str, float] = {}
    said: str = ""
    seconds: float = 0.0


class Dummies(StudyRecord):
    """The result file."""

    counts: dict[str, int]
    rows: list[Row]


class _Run:
    """One pipeline's way; ``stage`` is where it is."""

    def __init__(self, folder: Path, inputs: Mapping[str, Any]) -> None:
        self.folder, self.inputs, self.stage = folder, inputs, "find"
        self.errors: dict[str, float] = {}
        self.sampler = ""

    def go(self, scratch: Path) -> Outcome:
        import torch

        from dipgo.eager.gating import gated
        from dipgo.graph.trace import trace
        from dipgo.model.families import join
        from dipgo.model.models import find_model
        from dipgo.model.observed.request import Request
        from dipgo.schedule.schedule import Schedule
        from dipgo.schedule.search_record import SearchRecord
        from dipgo.schedule.subnet import make_subnet
        from engines.guidance import fixed_conditions
        from engines.pipeline.pipeline import load
        from export.compiler import compile_subnet

        sides = self.inputs.get("height"), self.inputs.get("width")
        pixels = (int(sides[0]), int(sides[1])) if all(sides) else None
        model = find_model(str(self.folder), pixels=pixels)
        scale = model.default_guidance
        model = model.at(scale, pixels if model.family.under else None)
        family = model.family
        self.stage = "sampler"
        scheduler, table = self._table(model)
        self.stage = "trace"
        traced = trace(model, None if family.granularity else "block", scale)
        gates = np.random.default_rng(3).random((table.calls, len(traced.sites))) < KEPT
        gates[0] = True
        subnet = make_subnet(traced, table.identity(scale), Schedule(gates, {}), SearchRecord())
        self.stage = "export"
        record = compile_subnet(subnet, model, scratch / "bundle")
        self.stage = "diffusers"
        pipe, prompts = model.pipeline(), [self.inputs.get("prompt") or "a red fox"]
        pipe.scheduler = scheduler
        pipe.set_progress_bar_config(disable=True)
        seen = family.seen
        asked = Request(scale, seen.asked if seen else None, STEPS, tuple(prompts), SEED, bool(seen and seen.pictures))
        accepted = inspect.signature(type(pipe).__call__).parameters

        def plain(output_type: str) -> np.ndarray:
            given = {name: value for name, value in asked.inputs(pipe, family.component).items() if name in accepted}
            given |= {"output_type": output_type}
            if family.conditioned_by == "class":
                given |= {"class_labels": [1], "guidance_scale": scale}
            with torch.no_grad(), gated(getattr(pipe, family.component), subnet):
                made = pipe(**given)[0]
            return np.asarray(made.float() if isinstance(made, torch.Tensor) else made)

        subjects = [1] if family.conditioned_by == "class" else prompts
        conditions = (
            {} if family.conditioned_by == "nothing" else join(*family.conditions(pipe, subjects), traced.rows > 1)
        )
        has_latent = hasattr(pipe, "vae") and family.conditioned_by != "class"
        expected = {
            kind: plain(kind)
            for kind in (("latent",) if has_latent else ())
            + (("np",) if record.decoder or not hasattr(pipe, "vae") else ())
        }
        self.stage = "run"
        with load(scratch / "bundle") as bundle:
            bundle.set_progress_bar_config(disable=True)
            given = fixed_conditions(record, min(traced.rows, 2)) | {
                name: value.numpy() for name, value in conditions.items()
            }
            latent = bundle.denoise(bundle.noise(1, SEED), given)
            if "latent" in expected:
                self.errors["latent"] = _distance(latent, expected["latent"])
            if "np" in expected:
                pixels_made = bundle.decode(latent) if record.decoder else (latent / 2 + 0.5).clip(0, 1)
                self.errors["image"] = _distance(pixels_made.transpose(0, 2, 3, 1), expected["np"])
            by_prompt = record.conditioning.encoder is not None
            if by_prompt:
                kind = "np" if "np" in expected else "latent"
                made = bundle(prompts, generator=SEED, output_type=kind).images
                self.errors["prompt"] = _distance(made, expected[kind])
        judged = [error for kind, error in self.errors.items() if kind != "latent" or "image" not in self.errors]
        if not judged or not max(judged) <= CLOSE:  # some pipelines hand latents out in another layout
            return "wrong"
        return "prompt" if by_prompt else "embeddings" if family.conditioned_by == "prompt" else family.conditioned_by

    def _table(self, model: Any) -> Any:
        from dipgo.model.sampler import make_scheduler

        first: DipgoError | None = None
        for name in SAMPLERS:
            try:
                scheduler = make_scheduler(name, model.scheduler)
                table = model.family.table(make_scheduler(name, model.scheduler), STEPS)
            except DipgoError as error:
                first = first or error
                continue
            self.sampler = table.name
            return scheduler, table
        assert first is not None
        raise first


def _distance(made: Any, expected: np.ndarray) -> float:
    made = np.asarray(made)
    if made.size != expected.size:
        return float("inf")
    return float(np.linalg.norm(made.reshape(expected.shape) - expected) / max(np.linalg.norm(expected), 1e-12))


def measure(folder: Path, inputs: Mapping[str, Any]) -> Row:
    """Take a pipeline all the way, as far as it goes."""
    way, started, said = _Run(folder, inputs), time.perf_counter(), ""
    with warnings.catch_warnings(record=True) as caught, tempfile.TemporaryDirectory() as scratch:
        warnings.simplefilter("always")
        try:
            outcome: Outcome = way.go(Path(scratch))
        except DipgoError as error:
            outcome, said = "refused", str(error)
        except Exception as error:  # what must not happen
            outcome, said = "failed", f"{type(error).__name__}: {one_line(error)}"
            traceback.print_exc()
    lines = [str(each.message) for each in caught if each.category.__name__ == "DipgoWarning"]
    return Row(
        name=folder.name,
        pipeline=str(read_object(folder / "model_index.json", "model_index.json").get("_class_name")),
        outcome=outcome,
        stage=way.stage,
        sampler=way.sampler,
        errors=way.errors,
        said=said or "; ".join(dict.fromkeys(lines)),
        seconds=round(time.perf_counter() - started, 1),
    )
