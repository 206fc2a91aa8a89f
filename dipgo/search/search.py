"""The search: from the best fixed policy, gates by gradient, learned backups; held-out noise chooses."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dipgo.cost import check_budget, cost_of
from dipgo.errors import UsageError
from dipgo.search.backups import Backups, learn_backups
from dipgo.search.gates import budgeted_scores, paper_scores
from dipgo.search.journal import Report, silent
from dipgo.search.losses import Loss, make_loss, psnr
from dipgo.search.policies import Policy, extrapolation, policies
from dipgo.search.postprocess import gates_at_budget
from dipgo.search.processes import processes
from dipgo.search.pruner import Pruner
from dipgo.search.run import Cadence, Run, open_run
from dipgo.search.settings import METHODS, PRECISIONS, PRESETS, Settings, check
from dipgo.search.task import Pool, Task
from dipgo.subnet import SubNet
from dipgo.trajectory import Batch


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
    report: Report = silent,
    run_folder: Path | None = None,
    resume: bool = False,
    tensorboard: bool = False,
) -> SubNet:
    """Search a SubNet that keeps ``budget`` of the full trajectory's MACs.

    ``method="dipgo"``: the best fixed policy (reuse or extrapolation) is the warm start; the gates move by gradient at
    the budget; backups are learned per step, site, term and channel. Every candidate is compared on held-out noise
    and the best is returned, so the result is never worse there than the best policy. ``method="paper"``: the paper's
    procedure, from keep-everything, serving last outputs.

    Started by ``accelerate launch``, every process of it searches on its share and returns the same.

    Args:
        run_folder: where checkpoints and figures are kept, see :mod:`dipgo.search.run`.
        resume: go on with the run that lies there.
        tensorboard: log figures for TensorBoard too.

    Raises:
        UsageError: an unknown method, or a budget that cannot be met.
        DipgoError: a loss that is not finite, a run folder that does not fit, a full disk.
    """
    if method not in METHODS:
        raise UsageError(f"unknown method '{method}'; use {' or '.join(METHODS)}")
    check_budget(task.trace, budget, task.sampler.calls, learned=method == "dipgo")
    check(settings)
    if len(settings.step_weights) not in (0, task.sampler.calls):
        raise UsageError(
            f"{len(settings.step_weights)} step weights for {task.sampler.calls} calls of the denoiser; give one a call"
        )
    started = time.time()
    torch.manual_seed(seed)
    task = task.with_trajectory(precision=PRECISIONS[settings.precision], recompute=settings.recompute)
    group = processes(task.trajectory.device)
    record = {
        "model": task.model.identity().model_dump(by_alias=True),
        "sampler": task.identity.model_dump(by_alias=True),
        "sites": task.trajectory.names,
        "choices": [str(choice) for choice in task.sampling.choices],
        "method": method,
        "budget": budget,
        "seed": seed,
        "settings": asdict(settings),
        "processes": group.count,
    }
    cadence = Cadence(settings.checkpoint_iterations, settings.checkpoint_seconds)
    run = open_run(run_folder, record, resume, tensorboard, cadence, group, report)
    judge = _Judge(task, settings.held_out, seed, run)
    follow = _paper if method == "paper" else _dipgo
    candidates = follow(task, budget, settings, seed, judge, run)
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


def _dipgo(task: Task, budget: float, settings: Settings, seed: int, judge: _Judge, run: Run) -> list[_Candidate]:
    trace, calls = task.trace, task.sampler.calls
    fixed = policies(trace, calls, budget)

    def judged() -> dict[str, np.ndarray]:
        found = []
        for number, policy in enumerate(fixed):
            found.append(judge.psnr(policy.gates, policy.weights))
            run.report("policies", number + 1, len(fixed), f"{policy.name} {found[-1]:.2f} dB")
        return {"psnr": np.array(found)}

    found = run.once("policies", judged)["psnr"]
    candidates = [_Candidate(p.name, p.gates, p.weights, float(db)) for p, db in zip(fixed, found, strict=True)]
    start = max((c for c in candidates if c.weights), key=lambda candidate: candidate.psnr)

    pool = Pool(task, settings.pool, settings.batch, seed + 1, run.processes, settings.chunk)
    masks = {start.name: start.gates}
    if settings.gate_iterations:
        scores = budgeted_scores(
            _pruner(task, settings, start.gates),
            trace,
            task.trajectory,
            pool,
            settings.gate_descent,
            _loss(task, settings),
            run.phase("gates"),
            budget,
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
        settings.backup_descent,
        _loss(task, settings),
        run.phase("backups"),
        cost_of(trace, masks[name], learned=True).ratio,
    )
    candidates.append(judge(f"{name}, learned backups", masks[name], backups.arrays()))
    return candidates


def _paper(task: Task, budget: float, settings: Settings, seed: int, judge: _Judge, run: Run) -> list[_Candidate]:
    scores = paper_scores(
        _pruner(task, settings, None),
        task.trace,
        task.trajectory,
        Pool(task, settings.pool, settings.batch, seed + 1, run.processes, settings.chunk),
        settings.gate_descent,
        _loss(task, settings),
        run.phase("gates"),
        settings.alpha,
        min(settings.tau, budget),
        settings.gamma,
    )
    return [judge("paper", gates_at_budget(task.trace, scores, budget), {})]


def _pruner(task: Task, settings: Settings, start: np.ndarray | None) -> Pruner:
    return Pruner(
        task.sampler.calls,
        len(task.trace.sites),
        settings.width,
        settings.layers,
        settings.heads,
        settings.hidden,
        settings.attention,
        start,
        confidence=1.0 if start is None else 0.5,
    )


def _loss(task: Task, settings: Settings) -> Loss:
    return make_loss(settings.loss, task.decode, settings.step_weights)


class _Judge:
    """Compares candidates on noise that nothing is learned from, by PSNR of the decoded images to the full ones.

    With several processes the main one judges for all, so that all choose alike.
    """

    def __init__(self, task: Task, count: int, seed: int, run: Run) -> None:
        self.task, self.run = task, run
        self.batch: Batch = task.sampling.draw(count, 2_000_000 + seed)

    def __call__(self, name: str, gates: np.ndarray, weights: Mapping[str, np.ndarray]) -> _Candidate:
        return _Candidate(name, gates, weights, self.run.processes.from_main(lambda: self.psnr(gates, weights)))

    def psnr(self, gates: np.ndarray, weights: Mapping[str, np.ndarray]) -> float:
        """Return the PSNR in dB; for the main process alone."""
        tensors = {key: torch.from_numpy(np.asarray(array)) for key, array in weights.items()}
        terms = next((array.shape[1] for array in weights.values()), 1)
        with torch.no_grad():
            latents = self.task.trajectory.gated(self.batch.noise, self.batch.conditions, gates, tensors, terms)
        return psnr(self._images(latents), self.reference)

    @cached_property
    def reference(self) -> torch.Tensor:
        return self._images(self.task.trajectory.full(self.batch.noise, self.batch.conditions))

    def _images(self, latents: list[torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            return self.task.decode(latents[-1])


def describe(search_record: Mapping[str, Any]) -> str:
    """Return one line on what a search chose and found."""
    found = search_record.get("held_out_psnr_db", {})
    chosen = search_record.get("chosen", search_record.get("method", "?"))
    return f"{chosen}: {found[chosen]:.2f} dB on held-out noise" if chosen in found else str(chosen)
