"""The search: from the best fixed policy, gates by gradient, learned backups; held-out noise chooses."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from dipgo.cost import check_budget, cost_of
from dipgo.errors import UsageError
from dipgo.search.backups import Backups, learn_backups
from dipgo.search.gates import budgeted_scores, paper_scores
from dipgo.search.losses import final_latent, psnr
from dipgo.search.policies import Policy, extrapolation, policies
from dipgo.search.postprocess import gates_at_budget
from dipgo.search.pruner import Pruner
from dipgo.search.task import Pool, Task
from dipgo.subnet import SubNet
from dipgo.trajectory import Batch

Report = Callable[[str, int, int, str], None]
"""Called with the phase, the iteration, how many there are, and a short figure."""


@dataclass(frozen=True)
class Settings:
    """How long and with what to search.

    Attributes:
        batch: images an iteration.
        pool: noises whose full trajectories are kept for the phases that use them more than once.
        held_out: noises on which candidates are compared; never used for learning.
        gate_iterations: of the gate phase.
        backup_iterations: of the backup phase.
        width: of the pruner's queries.
        gate_rate, backup_rate: learning rates.
        terms: K, how many computed outputs a backup combines.
        by_channel: one backup weight a channel instead of one a site.
    """

    batch: int = 8
    pool: int = 512
    held_out: int = 32
    gate_iterations: int = 60
    backup_iterations: int = 800
    width: int = 128
    gate_rate: float = 3e-4
    backup_rate: float = 2e-2
    terms: int = 2
    by_channel: bool = True


PRESETS = {
    "default": Settings(),
    "quick": Settings(pool=128, held_out=16, gate_iterations=15, backup_iterations=150),
}
METHODS = ("dipgo", "paper")


@dataclass(frozen=True)
class _Candidate:
    name: str
    gates: np.ndarray
    weights: Mapping[str, np.ndarray]
    psnr: float

    @property
    def terms(self) -> int:
        return next((array.shape[1] for array in self.weights.values()), 1)


def search(
    task: Task,
    budget: float,
    method: str = "dipgo",
    settings: Settings = PRESETS["default"],
    seed: int = 0,
    report: Report = lambda phase, iteration, total, figure: None,
) -> SubNet:
    """Search a SubNet that keeps ``budget`` of the full trajectory's MACs.

    ``method="dipgo"``: the best fixed policy (reuse or extrapolation) is the warm start; the gates move by gradient at
    the budget; backups are learned per step, site, term and channel. Every candidate is compared on held-out noise
    and the best is returned, so the result is never worse there than the best policy. ``method="paper"``: the paper's
    procedure, from keep-everything, serving last outputs.

    Raises:
        UsageError: an unknown method, or a budget that cannot be met.
    """
    if method not in METHODS:
        raise UsageError(f"unknown method '{method}'; use {' or '.join(METHODS)}")
    check_budget(task.trace, budget, task.sampler.calls, learned=method == "dipgo")
    started = time.time()
    torch.manual_seed(seed)
    judge = _Judge(task, settings.held_out, seed)
    run = _paper if method == "paper" else _dipgo
    candidates = run(task, budget, settings, seed, judge, report)
    best = max(candidates, key=lambda candidate: candidate.psnr)
    return SubNet(
        model=task.model.identity(),
        sampler=task.identity,
        sites=task.trace.sites,
        gates=best.gates,
        cost=cost_of(task.trace, best.gates, bool(best.weights)),
        terms=best.terms,
        weights=dict(best.weights),
        search={
            "method": method,
            "budget": budget,
            "seed": seed,
            "settings": asdict(settings),
            "seconds": round(time.time() - started, 1),
            "chosen": best.name,
            "held_out_psnr_db": {candidate.name: round(candidate.psnr, 3) for candidate in candidates},
            "versions": {name: version(name) for name in ("dipgo", "torch", "diffusers")}
            | {"python": platform.python_version()},
        },
    )


def policy_subnet(task: Task, policy: Policy) -> SubNet:
    """Return a fixed policy as a SubNet."""
    return SubNet(
        model=task.model.identity(),
        sampler=task.identity,
        sites=task.trace.sites,
        gates=policy.gates,
        cost=cost_of(task.trace, policy.gates, bool(policy.weights)),
        terms=policy.terms,
        weights=policy.weights,
        search={"method": policy.name},
    )


def _dipgo(task: Task, budget: float, settings: Settings, seed: int, judge: _Judge, report: Report) -> list[_Candidate]:
    trace, calls = task.trace, task.sampler.calls
    candidates = []
    fixed = policies(trace, calls, budget)
    for number, policy in enumerate(fixed):
        candidates.append(judge(policy.name, policy.gates, policy.weights))
        report("policies", number + 1, len(fixed), f"{policy.name} {candidates[-1].psnr:.2f} dB")
    start = max((c for c in candidates if c.weights), key=lambda candidate: candidate.psnr)

    pool = iter(Pool(task, settings.pool, settings.batch, seed + 1))
    masks = {start.name: start.gates}
    if settings.gate_iterations:
        pruner = Pruner(calls, len(trace.sites), settings.width, start=start.gates, confidence=0.5)
        scores = budgeted_scores(
            pruner,
            trace,
            task.trajectory,
            pool,
            settings.gate_iterations,
            settings.gate_rate,
            final_latent,
            budget,
            lambda k, loss: report("gates", k + 1, settings.gate_iterations, f"loss {loss:.2e}"),
        )
        moved = gates_at_budget(trace, scores, budget, learned=True)
        candidates.append(judge("gates by gradient", moved, extrapolation(trace, moved)))
        masks["gates by gradient"] = moved

    name = max(masks, key=lambda mask: next(c.psnr for c in candidates if c.name == mask))
    backups = Backups(trace, masks[name], settings.terms, settings.by_channel)
    learn_backups(
        backups,
        task.trajectory,
        pool,
        settings.backup_iterations,
        settings.backup_rate,
        final_latent,
        lambda k, loss: report("backups", k + 1, settings.backup_iterations, f"loss {loss:.2e}"),
    )
    candidates.append(judge(f"{name}, learned backups", masks[name], backups.arrays()))
    return candidates


def _paper(task: Task, budget: float, settings: Settings, seed: int, judge: _Judge, report: Report) -> list[_Candidate]:
    trace, calls = task.trace, task.sampler.calls
    pruner = Pruner(calls, len(trace.sites))
    scores = paper_scores(
        pruner,
        trace,
        task.trajectory,
        iter(Pool(task, settings.pool, 1, seed + 1)),
        settings.gate_iterations,
        0.1,
        final_latent,
        threshold=min(0.2, budget),
        after=lambda k, loss: report("gates", k + 1, settings.gate_iterations, f"loss {loss:.2e}"),
    )
    return [judge("paper", gates_at_budget(trace, scores, budget), {})]


class _Judge:
    """Compares candidates on noise that nothing is learned from, by PSNR of the decoded images to the full ones."""

    def __init__(self, task: Task, count: int, seed: int) -> None:
        self.task = task
        self.batch: Batch = task.sampling.draw(count, 2_000_000 + seed)
        self.reference = self._images(task.trajectory.full(self.batch.noise, self.batch.conditions))

    def __call__(self, name: str, gates: np.ndarray, weights: Mapping[str, np.ndarray]) -> _Candidate:
        candidate = _Candidate(name, gates, weights, 0.0)
        tensors = {key: torch.from_numpy(np.asarray(array)) for key, array in weights.items()}
        with torch.no_grad():
            latents = self.task.trajectory.gated(
                self.batch.noise, self.batch.conditions, gates, tensors, candidate.terms
            )
        return replace(candidate, psnr=psnr(self._images(latents), self.reference))

    def _images(self, latents: list[torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            return self.task.decode(latents[-1])


def describe(search_record: Mapping[str, Any]) -> str:
    """Return one line on what a search chose and found."""
    found = search_record.get("held_out_psnr_db", {})
    chosen = search_record.get("chosen", search_record.get("method", "?"))
    return f"{chosen}: {found[chosen]:.2f} dB on held-out noise" if chosen in found else str(chosen)
