"""How long and with what to search: one record, its presets, and ``NAME=VALUE`` overrides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, get_type_hints

import torch

from dipgo.base.errors import UsageError
from dipgo.schedule.gates_at_budget import POSTPROCESSES
from dipgo.searching.losses import make_loss
from dipgo.searching.pruner import check_dimensions
from dipgo.searching.training_loop import Descent

PRECISIONS = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}
METHODS = ("dipgo", "paper")
POSITIVE = ("batch", "chunk", "held_out", "terms", "moves_on", "drops_on", "contenders")
NATURAL = ("pool", "moves", "drops", "gate_iterations", "trial_iterations", "backup_iterations", "backup_warmup")

CADENCE = ("checkpoint_iterations", "checkpoint_seconds")  # the settings that no result depends on


@dataclass(frozen=True)
class Settings:
    """Everything about a search that is not the task and the budget.

    Attributes:
        batch: images an iteration, in each process.
        pool: noises whose full trajectories are kept for the phases that use them more than once; 0 draws fresh noise
            at every iteration.
        chunk: how many images are computed at once where nothing is learned: full trajectories, and what is judged.
        held_out: noises on which candidates are compared; never used for learning.
        moves: places of computed steps that are measured, to choose when to compute
            (:func:`dipgo.searching.local_search.move_steps`); 0 leaves this out, and so does no ``drops``. They
            won one search of four (docs/searching.md).
        moves_on: noises on which moves are measured, in fours: most moves are given up after the first of them.
        drops: gates whose loss is measured, for each spacing, to choose what goes from schedules that cost too much
            (:func:`dipgo.searching.greedy_prune.drop_cheapest`); 0 leaves this out.
        drops_on: noises on which drops are measured, and where between reuse and extrapolation backups should start.
        contenders: how many different gates are given learned backups for a while. While there are more than three, the
            better half learns on for twice as long; then the best learns on.
        gate_iterations: of the gate phase; 0 leaves it out.
        trial_iterations, backup_iterations: of the backup phase, for each of the contenders at first, and in all for
            the best, in whole trajectories: at a budget of 0.25 there are four times as many, for each costs a quarter.
        gate_rate, backup_rate: learning rates; that of backups is for a whole trajectory, and at a budget of 0.25
            sixteen times as high, for the closer gates are to the full trajectory, the lower is the best. Below 0.2 it
            grows no more.
        gate_schedule, backup_schedule: ``cosine`` or ``constant``.
        optimiser: of the gate phase, ``adam`` or ``sgd``.
        warmup, weight_decay, clip: of the gate phase, see :class:`dipgo.searching.training_loop.Descent`.
        backup_warmup: of the backup phase, in iterations: without it Adam's first steps are as long as any and as noisy
            as one batch, which spoils what starts well and misleads trials.
        accumulate: batches that make one update, in every phase.
        width, layers, heads, hidden, attention: of the pruner, see :class:`dipgo.searching.pruner.Pruner`.
        alpha, tau, gamma: the paper's α, τ (no more than the least budget counts), and whether gates are weighted by γ.
        postprocess: from scores to gates, ``bisection`` (the paper's Algorithm 1) or ``sweep`` (the public code's).
        loss: see :func:`dipgo.searching.losses.make_loss`.
        step_weights: of the latent term, one number a call; empty takes the final latent alone.
        terms: K, how many computed outputs a backup combines.
        by_channel: one backup weight a channel instead of one a site.
        by_half: one backup weight for either half of guidance instead of the same for both.
        precision: ``fp32``, ``fp16`` or ``bf16``, of the denoiser.
        recompute: keep no activations between steps: less memory, a third more time.
        checkpoint_iterations, checkpoint_seconds: how often a run folder gets a checkpoint; 0 is never. A
            resumed run may have others.
    """

    batch: int = 8
    pool: int = 1024
    chunk: int = 32
    held_out: int = 32
    moves: int = 0
    moves_on: int = 16
    drops: int = 48
    drops_on: int = 8
    contenders: int = 6
    gate_iterations: int = 0
    trial_iterations: int = 8
    backup_iterations: int = 200
    gate_rate: float = 3e-4
    backup_rate: float = 1.25e-3
    gate_schedule: str = "constant"
    backup_schedule: str = "cosine"
    optimiser: str = "adam"
    warmup: int = 0
    backup_warmup: int = 8
    weight_decay: float = 0.0
    clip: float = 0.0
    accumulate: int = 1
    width: int = 128
    layers: int = 1
    heads: int = 1
    hidden: int = 128
    attention: str = "step"
    alpha: float = 1.0
    tau: float = 0.2
    gamma: bool = True
    postprocess: str = "bisection"
    loss: str = "psnr"
    step_weights: tuple[float, ...] = ()
    terms: int = 2
    by_channel: bool = True
    by_half: bool = True
    precision: str = "fp32"
    recompute: bool = False
    checkpoint_iterations: int = 0
    checkpoint_seconds: float = 60.0

    def deciding(self) -> dict[str, Any]:
        """Return the settings that a result depends on, by name."""
        return {name: value for name, value in asdict(self).items() if name not in CADENCE}

    @property
    def gate_descent(self) -> Descent:
        return Descent(
            self.gate_iterations,
            self.gate_rate,
            self.optimiser,
            self.gate_schedule,
            self.warmup,
            self.weight_decay,
            self.clip,
            self.accumulate,
        )

    def backup_descent(self, iterations: int, budget: float) -> Descent:
        return Descent(
            iterations,
            self.backup_rate / max(budget, 0.2) ** 2,
            schedule=self.backup_schedule,
            warmup=self.backup_warmup,
            accumulate=self.accumulate,
        )


PRESETS = {
    "default": Settings(),
    "quick": Settings(pool=128, held_out=16, drops=0, contenders=1, trial_iterations=0, backup_iterations=52),
}

PAPER: dict[str, Any] = {
    "batch": 1,
    "loss": "ssim",
    "gate_iterations": 1000,
    "width": 512,
    "optimiser": "sgd",
    "gate_rate": 0.1,
    "gate_schedule": "cosine",
    "weight_decay": 1e-4,
    "clip": 1.0,
}
"""Where the paper's optimisation differs from the presets (its section 4.1; clipping is the public code's)."""


def settings_of(method: str, preset: str, overrides: Sequence[str] = ()) -> Settings:
    """Return a preset, as the method needs it, with overrides such as ``alpha=0.5``.

    Raises:
        UsageError: an unknown method, preset or setting, or a value of the wrong kind.
    """
    if method not in METHODS:
        raise UsageError(f"unknown method '{method}'; use {' or '.join(METHODS)}")
    if preset not in PRESETS:
        raise UsageError(f"unknown preset '{preset}'; use {' or '.join(PRESETS)}")
    settings = replace(PRESETS[preset], **(PAPER if method == "paper" else {}))
    kinds = get_type_hints(Settings)
    changes = {}
    for pair in overrides:
        name, equals, text = pair.partition("=")
        if not equals or name not in kinds:
            raise UsageError(
                f"unknown setting '{pair}'; use NAME=VALUE with {', '.join(f.name for f in fields(Settings))}"
            )
        changes[name] = _value(name, text, kinds[name])
    settings = replace(settings, **changes)
    check(settings)
    return settings


def check(settings: Settings) -> None:
    """Refuse settings that make no search."""
    for names, lowest in ((POSITIVE, 1), (NATURAL, 0)):
        for name in names:
            if getattr(settings, name) < lowest:
                raise UsageError(f"{name} = {getattr(settings, name)}; give at least {lowest}")
    if settings.postprocess not in POSTPROCESSES:
        raise UsageError(f"unknown postprocess '{settings.postprocess}'; use {', '.join(POSTPROCESSES)}")
    make_loss(settings.loss, lambda latents: latents, settings.step_weights)
    check_dimensions(settings.width, settings.layers, settings.heads, settings.hidden, settings.attention)
    _ = settings.gate_descent, settings.backup_descent(0, 1)  # they check themselves
    if settings.precision not in PRECISIONS:
        raise UsageError(f"unknown precision '{settings.precision}'; use {', '.join(PRECISIONS)}")


def _value(name: str, text: str, kind: Any) -> Any:
    try:
        if kind is bool:
            return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
        if kind is str:
            return text
        if kind is int:
            return int(text)
        if kind is float:
            return _finite(text)
        return tuple(_finite(part) for part in text.split(",") if part)
    except (ValueError, KeyError) as error:
        wanted = {bool: "true or false", int: "a whole number", float: "a number"}.get(kind, "numbers joined by commas")
        raise UsageError(f"{name} = '{text}': give {wanted}") from error


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"'{text}' is not finite")
    return number
