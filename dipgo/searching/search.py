"""The search: fixed policies, measured moves and drops, learned backups; noise that nothing learned from chooses."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from dipgo.base.errors import UsageError
from dipgo.base.files import sha256_of_json
from dipgo.base.progress import Report, silent
from dipgo.graph.latency import LatencyProfile, timed
from dipgo.graph.trace import Trace
from dipgo.schedule.cost import check_budget, cost_of
from dipgo.schedule.gates_at_budget import POSTPROCESSES
from dipgo.schedule.policies import Policy
from dipgo.schedule.subnet import SubNet
from dipgo.searching.candidates import contenders
from dipgo.searching.config import SearchConfig
from dipgo.searching.context import Work
from dipgo.searching.distributed import processes
from dipgo.searching.gate_training import paper_scores
from dipgo.searching.judge import Candidate, Judge
from dipgo.searching.losses import make_loss
from dipgo.searching.run_folder import Cadence, open_run
from dipgo.searching.successive_halving import learned
from dipgo.searching.task import Pool, Task
from dipgo.searching.training_loop import gate_descent
from dipgo.searching.warm_starts import check_starts, digest_of

PRECISIONS = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}


def search(
    task: Task,
    config: SearchConfig,
    report: Report = silent,
    profile: LatencyProfile | None = None,
    starts: Sequence[SubNet] = (),
) -> SubNet:
    """Search a SubNet that keeps the (largest) budget's share of the full trajectory's MACs; see :func:`sweep`."""
    return next(iter(sweep(task, config, report, profile, starts)))


def sweep(
    task: Task,
    config: SearchConfig,
    report: Report = silent,
    profile: LatencyProfile | None = None,
    starts: Sequence[SubNet] = (),
) -> Iterator[SubNet]:
    """Search a SubNet for each of several budgets, the largest first; each starts from what the last one found.

    Arguments are checked at once; the search goes on as far as the SubNets are asked for.

    ``method="dipgo"``: fixed policies are judged; the best of them, what measured moves and drops make of schedules
    that cost too much, and the last budget's gates thinned out are given learned backups for a while, and the best of
    these learns on. Every candidate is judged on held-out noise and the best is returned, so the result is never worse
    there than the best policy.
    ``method="paper"``: the paper's procedure, from keep-everything, serving last outputs; one optimisation gives the
    scores for all budgets.

    Started by ``torchrun`` or ``accelerate launch``, every process of it searches on its share and returns the same.

    Args:
        task: what :func:`dipgo.searching.task.make_task` makes of the config's steps, sampler, sites, ….
        config: budgets, method, settings, seed, and the run folder, see :mod:`dipgo.searching.run_folder`.
        profile: measured times, of which the budgets are shares then, instead of MACs; kept with the SubNets.
        starts: SubNets to begin with, besides the policies; for ``method="dipgo"``. Those that fit a budget are judged
            there as they are, so the result is never worse there than they are; others are thinned out first.

    Returns:
        One SubNet a budget, as each is found.

    Raises:
        UsageError: a budget that cannot be met, or a start that does not fit.
        DipgoError: a loss that is not finite, a run folder that does not fit, a full disk.
    """
    budgets, method = config.budget, config.method
    traced = task.trace
    if profile:
        task = replace(task, trace=timed(traced, profile))
    for budget in budgets:
        check_budget(task.trace, budget, task.sampler.calls, learned=method == "dipgo")
    if starts and method == "paper":
        raise UsageError("the paper's method begins with everything kept; starts are for --method dipgo")
    check_starts(starts, traced, task.sampler.calls, config.history)
    if len(config.step_weights) not in (0, task.sampler.calls):
        raise UsageError(
            f"{len(config.step_weights)} step weights for {task.sampler.calls} calls of the denoiser; give one a call"
        )
    torch.manual_seed(config.seed)
    task = task.with_trajectory(precision=PRECISIONS[config.precision], recompute=config.recompute)
    group = processes(task.trajectory.device)
    record = {
        "dipgo": version("dipgo"),  # another may judge other policies, or number its phases otherwise
        "model": task.model.identity().model_dump(by_alias=True),
        "sampler": task.identity.model_dump(by_alias=True),
        "sites": task.trajectory.names,
        "choices": [str(choice) for choice in task.sampling.choices],
        "method": method,
        "budgets": list(budgets),
        "seed": config.seed,
        "settings": config.deciding(),
        "processes": group.count,
        "profile": profile.model_dump(by_alias=True) if profile else None,
    } | ({"starts": [digest_of(start) for start in starts]} if starts else {})
    cadence = Cadence(config.checkpoint_iterations, config.checkpoint_seconds)
    run = open_run(config.run_folder, record, config.resume, config.tensorboard, cadence, group, report)
    work = Work(
        task,
        config,
        config.seed,
        run,
        Pool(task, config.pool, config.batch, config.seed + 1, group, config.chunk),
        Judge(task, config.held_out, 2_000_000 + config.seed, run, config.chunk),
        Judge(task, config.drops_on, 4_000_000 + config.seed, run, config.chunk),
        make_loss(config.loss, task.decode, config.step_weights),
        starts,
    )
    return _found(work, budgets, method, traced, profile)


def _found(
    work: Work, budgets: Sequence[float], method: str, traced: Trace, profile: LatencyProfile | None
) -> Iterator[SubNet]:
    task = work.task
    gates, scores, shared = None, None, 0.0
    if method == "paper":
        work.run.clock.start("scores")
        scores = _paper_scores(work, min(budgets))
        shared = _seconds(work, "scores")
    for budget in sorted(set(budgets), reverse=True):
        work.run.clock.start(f"{budget:g}")
        candidates = _dipgo(work, budget, gates) if scores is None else [_paper(work, budget, scores)]
        best = max(candidates, key=lambda candidate: candidate.psnr)
        gates = best.gates
        yield SubNet(
            model=task.model.identity(),
            sampler=task.identity,
            sites=traced.sites,
            gates=best.gates,
            cost=cost_of(traced, best.gates, bool(best.weights)),
            terms=best.terms,
            weights=dict(best.weights),
            search={
                "method": method,
                "budget": budget,
                "cost": _cost(task.trace, best, profile),
                "seed": work.seed,
                "choices": _choices(task.sampling.choices),
                "starts": [digest_of(start) for start in work.starts],
                "processes": work.run.processes.count,
                "settings": work.settings.deciding(),
                "seconds": round(shared + _seconds(work, f"{budget:g}"), 1),
                "chosen": best.name,
                "best_policy": _best_policy(candidates),
                "held_out_psnr_db": {candidate.name: round(candidate.psnr, 3) for candidate in candidates},
                "versions": {name: version(name) for name in ("dipgo", "torch", "diffusers")}
                | {"python": platform.python_version()},
            },
        )


def _choices(choices: Sequence[object]) -> dict[str, Any]:
    """Return how many prompts or classes noise is paired with, and a digest of them in their order."""
    return {"count": len(choices), "sha256": sha256_of_json([str(choice) for choice in choices])}


def _seconds(work: Work, part: str) -> float:
    """Return how long a part of the search took, also when it was finished before its run was killed and resumed."""
    arrays = work.run.once(f"seconds-{part}", lambda: {"seconds": np.array(work.run.clock.seconds())})
    return float(arrays["seconds"].item())


def _best_policy(candidates: Sequence[Candidate]) -> str | None:
    """Return the best fixed policy's name; None where none was judged."""
    fixed = [candidate for candidate in candidates if candidate.fixed]
    return max(fixed, key=lambda candidate: candidate.psnr).name if fixed else None


def _cost(priced: Trace, best: Candidate, profile: LatencyProfile | None) -> dict[str, Any]:
    """Return what the budget was a share of, and for latency the profile and the share that is kept by it."""
    if profile is None:
        return {"kind": "macs"}
    ratio = cost_of(priced, best.gates, bool(best.weights)).ratio
    return {"kind": "latency", "ratio": round(ratio, 6), "profile": profile.model_dump(mode="json", by_alias=True)}


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


def _dipgo(work: Work, budget: float, last: np.ndarray | None) -> list[Candidate]:
    judged, best = contenders(work, budget, last)
    return [*judged, *learned(work, budget, best[: work.settings.contenders])]


def _paper_scores(work: Work, least: float) -> np.ndarray:
    settings = work.settings
    return paper_scores(
        work.pruner(None),
        work.task.trace,
        work.task.trajectory,
        work.pool,
        gate_descent(settings),
        work.loss,
        work.run.phase("gates"),
        settings.alpha,
        min(settings.tau, least),
        settings.gamma,
    )


def _paper(work: Work, budget: float, scores: np.ndarray) -> Candidate:
    gates = POSTPROCESSES[work.settings.postprocess](work.task.trace, scores, budget, False)
    return work.judge("paper", gates, {})


def describe(search_record: Mapping[str, Any]) -> str:
    """Return one line on what a search chose and found."""
    found = search_record.get("held_out_psnr_db", {})
    chosen = search_record.get("chosen", search_record.get("method", "?"))
    return f"{chosen}: {found[chosen]:.2f} dB on held-out noise" if chosen in found else str(chosen)
