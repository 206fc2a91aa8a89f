"""Schedules side by side, in torch, without an export: the record of ``dipgo judge`` and its table.

Every schedule runs on the same held-out noise and classes or prompts; what it makes is held against the full
trajectory's. As many plain steps of the same solver as its MACs pay for stand beside it. Differences are taken image by
image, and their bootstrap intervals hold together at 95 % (Bonferroni).

``python -m benchmarks.bench.judgement`` prints the JSON Schema; run it into ``schemas/judgement-1.json`` when a record
changes.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from itertools import combinations
from typing import Literal

import numpy as np
import torch
from pydantic import Field

from benchmarks.bench.chance import CHANCE, mean_interval
from benchmarks.bench.config import JudgeConfig
from benchmarks.bench.judge import Judge
from benchmarks.bench.page import aligned
from benchmarks.bench.quality import Outputs, Quality
from benchmarks.bench.quality import compare as quality_of
from benchmarks.bench.reference import task_for
from benchmarks.bench.report import decibels
from benchmarks.bench.subjects import IMAGE_SEED
from benchmarks.environment import Environment, environment, load_average
from dipgo.base.errors import UsageError
from dipgo.base.progress import Report, silent
from dipgo.base.records import ModelIdentity, Record, SamplerIdentity
from dipgo.eager.sampling import Batch, select
from dipgo.model.models import Model
from dipgo.schedule.subnet import SubNet
from dipgo.searching.task import Choices, Task
from export.sources import check_model

SCHEMA: Literal["dipgo.judgement/1"] = "dipgo.judgement/1"
AT_ONCE = 16  # images, of small models
LATENT_VALUES = 2**16  # that are computed at once of large ones


class Judged(Record):
    """One schedule, or plain steps; ``macs_ratio`` is over the full trajectory's MACs."""

    name: str
    steps: int
    macs_ratio: float
    quality: Quality


class Difference(Record):
    """How much closer to the full trajectory's images ``first`` comes than ``second``, in the mean over images.

    ``low`` and ``high`` bound the difference in PSNR, ``ssim_low`` and ``ssim_high`` that in SSIM, which small images
    lack.
    """

    first: str
    second: str
    psnr_db: float
    low: float
    high: float
    ssim: float | None = None
    ssim_low: float | None = None
    ssim_high: float | None = None

    @property
    def beyond_chance(self) -> bool:
        """Whether the interval in PSNR excludes that they are equal."""
        return not self.low <= 0 <= self.high

    def line(self) -> str:
        """Return the difference as a sentence, the closer one first."""
        first, second, sign = (self.first, self.second, 1) if self.psnr_db >= 0 else (self.second, self.first, -1)
        low, high = sorted((sign * self.low, sign * self.high))
        figures = f"{abs(self.psnr_db):.2f} dB ({low:+.2f} to {high:+.2f})"
        if not self.beyond_chance:
            return f"{first} and {second}: no difference beyond chance, {figures}"
        return f"{first} is closer than {second} by {figures}"


class Judgement(Record):
    """What ``dipgo judge --json`` writes."""

    schema_id: Literal["dipgo.judgement/1"] = Field(alias="schema", default=SCHEMA)
    created: str = Field(description="ISO 8601, UTC")
    command: str
    environment: Environment
    model: ModelIdentity
    sampler: SamplerIdentity
    images: int
    seed: int
    prompts: int = Field(description="how many prompts or classes the noise is paired with")
    rows: list[Judged] = Field(description="the schedules in the order given, then plain steps")
    differences: list[Difference] = Field(description="of all pairs of schedules, and of each with its plain steps")


def judge(subnets: Mapping[str, SubNet], model: Model, config: JudgeConfig, progress: Report = silent) -> Judgement:
    """Judge SubNets, by name, all of one model and sampler.

    Raises:
        UsageError: SubNets of different samplers, steps or guidance, or prompts that do not fit the model.
        DipgoError: a SubNet of another model, or a file of prompts that cannot be read.
    """
    load_at_start = load_average()
    first = next(iter(subnets.values()))
    for name, subnet in subnets.items():
        check_model(subnet, model)
        if subnet.sampler != first.sampler:
            raise UsageError(
                f"{name} is for {_sampler(subnet)}, the first for {_sampler(first)}; judge those of one sampler"
            )
    if config.guidance is not None:
        subnets = {name: _at_guidance(subnet, model, config.guidance) for name, subnet in subnets.items()}
        first = next(iter(subnets.values()))
    if config.threads:
        torch.set_num_threads(config.threads)
    task = task_for(
        first, model, device=config.device, choices=Choices(config.prompts, config.classes), progress=progress
    )
    judge = Judge(task, list(_batches(task, config.images)), progress)
    reference = judge.full(task)

    def judged(name: str, steps: int, ratio: float, outputs: Outputs) -> Judged:
        return Judged(
            name=name, steps=steps, macs_ratio=ratio, quality=quality_of(outputs, reference, judge.labels, model.name)
        )

    steps = first.sampler.steps
    rows = [judged(name, steps, each.cost.ratio, judge.gated(each, name)) for name, each in subnets.items()]
    counts = {name: max(2, round(steps * each.cost.ratio)) for name, each in subnets.items()}
    plain = [judged(_plain(count), count, count / steps, judge.plain(count)) for count in sorted(set(counts.values()))]
    pairs = [*combinations(subnets, 2), *((name, _plain(count)) for name, count in counts.items())]
    return Judgement(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=shlex.join(["dipgo", *sys.argv[1:]]),
        environment=environment(load_at_start),
        model=model.identity(),
        sampler=first.sampler,
        images=config.images,
        seed=IMAGE_SEED,
        prompts=len(set(task.sampling.choices)),
        rows=[*rows, *plain],
        differences=list(differences([*rows, *plain], pairs)),
    )


def _at_guidance(subnet: SubNet, model: Model, scale: float) -> SubNet:
    """Return a SubNet as it serves requests of another guidance scale."""
    own = subnet.sampler.guidance
    if model.at(scale).family.guides(scale) != model.at(own).family.guides(own):
        raise UsageError(
            f"--guidance {scale:g} makes another number of passes than the search's {own:g}; give one with as many"
        )
    return replace(subnet, sampler=subnet.sampler.model_copy(update={"guidance_scale": scale, "guidance_spread": 0.0}))


def differences(rows: Sequence[Judged], pairs: Sequence[tuple[str, str]]) -> Iterator[Difference]:
    """Yield the difference of each pair of rows, by name."""
    quality = {row.name: row.quality for row in rows}
    chance = CHANCE / len(pairs)
    for first, second in pairs:
        psnr = np.subtract(quality[first].each_psnr_db, quality[second].each_psnr_db)
        low, high = mean_interval(psnr, chance)
        figures = {}
        if quality[first].each_ssim:
            ssim = np.subtract(quality[first].each_ssim, quality[second].each_ssim)
            interval = mean_interval(ssim, chance)
            figures = {"ssim": float(ssim.mean()), "ssim_low": interval[0], "ssim_high": interval[1]}
        yield Difference(first=first, second=second, psnr_db=float(psnr.mean()), low=low, high=high, **figures)


_COLUMNS = ("schedule", "MACs", "PSNR", "95% interval", "worst image", "SSIM", "latent error", "class accuracy")


def table(judgement: Judgement) -> str:
    """Return the rows as columns of text, the closest first, then the differences and what was judged on."""
    rows = sorted(judgement.rows, key=lambda row: -row.quality.image_psnr_db)
    cells = [_cells(row) for row in rows]
    filled = [any(row[column] for row in cells) for column in range(len(_COLUMNS))]
    lines = [[cell for cell, shown in zip(row, filled, strict=True) if shown] for row in (_COLUMNS, *cells)]
    sampler = judgement.sampler
    return "\n".join(
        [
            *aligned(lines),
            *(difference.line() for difference in judgement.differences),
            f"PSNR is the mean of {judgement.images} images, to those of all {sampler.steps} steps of "
            f"{sampler.class_name} at guidance {sampler.guidance_scale:g}; intervals in brackets hold together at 95%",
        ]
    )


def _cells(row: Judged) -> list[str]:
    quality = row.quality
    return [
        row.name,
        f"{row.macs_ratio:.1%}",
        decibels(quality.image_psnr_db),
        f"{quality.image_psnr_low_db:.1f} to {quality.image_psnr_high_db:.1f}",
        decibels(min(quality.each_psnr_db)),
        "" if quality.ssim is None else f"{quality.ssim:.4f}",
        "" if quality.latent_error is None else f"{quality.latent_error:.1e}",
        "" if quality.class_accuracy is None else f"{quality.class_accuracy:.1%}",
    ]


def _plain(steps: int) -> str:
    return f"{steps} plain steps"


def _sampler(subnet: SubNet) -> str:
    sampler = subnet.sampler
    return f"{sampler.steps} steps of {sampler.class_name} at guidance {sampler.guidance_scale:g}"


def _batches(task: Task, count: int) -> Iterator[Batch]:
    """Yield the judged noise with its classes or prompts, as many images at once as the model's size allows."""
    images = task.sampling.draw(count, IMAGE_SEED)
    at_once = max(1, min(AT_ONCE, LATENT_VALUES // images.noise[0].numel()))
    yield from (select(images, rows) for rows in torch.arange(count).split(at_once))


def json_schema() -> str:
    """Return the JSON Schema of a judgement."""
    return json.dumps(Judgement.model_json_schema(by_alias=True), indent=2) + "\n"


if __name__ == "__main__":
    print(json_schema(), end="")
