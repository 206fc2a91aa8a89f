"""The search: fixed schedules, measured drops, learned backups; noise that nothing learned from chooses."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from importlib.metadata import version

import numpy as np
import torch

from dipgo.base.errors import UsageError
from dipgo.base.files import sha256_of_json
from dipgo.base.progress import Report, silent
from dipgo.graph.costs import check_budget
from dipgo.graph.latency import LatencyProfile
from dipgo.schedule.gates_at_budget import POSTPROCESSES
from dipgo.schedule.schedule import Schedule
from dipgo.schedule.search_record import BudgetKind
from dipgo.schedule.subnet import SubNet
from dipgo.searching.candidates import Candidate, candidates
from dipgo.searching.config import SearchConfig
from dipgo.searching.context import SearchContext
from dipgo.searching.distributed import processes
from dipgo.searching.gate_training import Sparsity, paper_scores
from dipgo.searching.judge import Judge
from dipgo.searching.losses import make_loss
from dipgo.searching.pool import Pool
from dipgo.searching.pruner import Pruner
from dipgo.searching.run_folder import Cadence, open_run
from dipgo.searching.successive_halving import with_learned_backups
from dipgo.searching.task import Task
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
    return next(sweep(task, config, report, profile, starts))


def sweep(
    task: Task,
    config: SearchConfig,
    report: Report = silent,
    profile: LatencyProfile | None = None,
    starts: Sequence[SubNet] = (),
) -> Iterator[SubNet]:
    """Search a SubNet for each of several budgets, the largest first; each starts from what the last one found.

    Arguments are checked at once; the search goes on as far as the SubNets are asked for.

    ``method="dipgo"``: fixed schedules are judged; the best of them, what measured drops make of schedules that cost
    too much, and the last budget's gates thinned out are given learned backups for a while, and the best of these
    learns on. Every candidate is judged on held-out noise and the best is returned, so the result is never worse there
    than the best fixed schedule.
    ``method="paper"``: the paper's procedure, from keep-everything, serving last outputs; one optimisation gives the
    scores for all budgets.

    Started by ``torchrun`` or ``accelerate launch``, every process of it searches on its share and returns the same.

    Args:
        task: what :func:`dipgo.searching.task.make_task` makes of the config's steps, sampler, sites, ….
        config: budgets, method, settings, seed, and the run folder, see :mod:`dipgo.searching.run_folder`.
        profile: measured times, of which the budgets are shares then, instead of MACs; kept with the SubNets.
        starts: SubNets to begin with, besides the fixed schedules; for ``method="dipgo"``. Those that fit a budget are
            judged there as they are, so the result is never worse there than they are; others are thinned out first.

    Returns:
        One SubNet a budget, as each is found.

    Raises:
        UsageError: a budget that cannot be met, or a start that does not fit.
        DipgoError: a loss that is not finite, a run folder that does not fit, a full disk.
    """
    budgets, method = config.budget, config.method
    costs = profile.costs(task.trace) if profile else task.trace.macs
    for budget in budgets:
        check_budget(costs, budget, task.sampler.calls, learned=method == "dipgo")
    if starts and method == "paper":
        raise UsageError("the paper's method begins with everything kept; starts are for --method dipgo")
    check_starts(starts, task.trace, task.sampler.calls, config.history)
    if len(config.step_weights) not in (0, task.sampler.calls):
        raise UsageError(
            f"{len(config.step_weights)} step weights for {task.sampler.calls} calls of the denoiser; give one a call"
        )
    torch.manual_seed(config.seed)
    task = task.with_trajectory(precision=PRECISIONS[config.precision], recompute=config.recompute)
    group = processes(task.trajectory.device)
    record = {
        "dipgo": version("dipgo"),  # another may judge other schedules, or number its phases otherwise
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
    context = SearchContext(
        task,
        costs,
        config,
        run,
        pool=Pool(task, config.pool, config.batch, config.seed + 1, group, config.chunk),
        judge=Judge(task, config.held_out, 2_000_000 + config.seed, run, config.chunk),
        ground=Judge(task, config.drops_on, 4_000_000 + config.seed, run, config.chunk),
        loss=make_loss(config.loss, task.decode, config.step_weights),
        starts=starts,
    )
    return _subnets(context, profile)


def _subnets(context: SearchContext, profile: LatencyProfile | None) -> Iterator[SubNet]:
    task, clock, settings = context.task, context.run.clock, context.settings
    last, scores, shared = None, None, 0.0
    if settings.method == "paper":
        clock.start("scores")
        scores = _paper_scores(context, min(settings.budget))
        shared = _seconds(context, "scores")
    choices = [str(choice) for choice in task.sampling.choices]
    for budget in sorted(set(settings.budget), reverse=True):
        clock.start(f"{budget:g}")
        if scores is None:
            judged, starts = candidates(context, budget, last)
            judged += with_learned_backups(context, budget, starts[: settings.contenders])
        else:
            schedule = Schedule(POSTPROCESSES[settings.postprocess](context.costs, scores, budget, 1))
            judged = [Candidate("paper", schedule, context.judge(schedule))]
        best = max(judged, key=lambda candidate: candidate.psnr)
        fixed = [candidate for candidate in judged if candidate.fixed]
        last = best.schedule
        yield task.subnet(
            best.schedule,
            method=settings.method,
            budget=budget,
            cost=_cost(context, best.schedule, profile),
            seed=settings.seed,
            choices={"count": len(choices), "sha256": sha256_of_json(choices)},
            starts=[digest_of(start) for start in context.starts],
            processes=context.run.processes.count,
            settings=settings.deciding(),
            seconds=round(shared + _seconds(context, f"{budget:g}"), 1),
            chosen=best.name,
            best_policy=max(fixed, key=lambda candidate: candidate.psnr).name if fixed else None,
            held_out_psnr_db={candidate.name: round(candidate.psnr, 3) for candidate in judged},
            versions={name: version(name) for name in ("dipgo", "torch", "diffusers")}
            | {"python": platform.python_version()},
        )


def _seconds(context: SearchContext, part: str) -> float:
    """Return how long a part of the search took, also when it was finished before its run was killed and resumed."""
    arrays = context.run.once(f"seconds-{part}", lambda: {"seconds": np.array(context.run.clock.seconds())})
    return float(arrays["seconds"].item())


def _cost(context: SearchContext, schedule: Schedule, profile: LatencyProfile | None) -> BudgetKind:
    if profile is None:
        return BudgetKind(kind="macs")
    return BudgetKind(kind="latency", ratio=round(schedule.share(context.costs), 6), profile=profile)


def _paper_scores(context: SearchContext, least: float) -> np.ndarray:
    settings = context.settings
    dimensions = (settings.width, settings.layers, settings.heads, settings.hidden, settings.attention)
    pruner = Pruner(context.task.sampler.calls, len(context.trace.sites), *dimensions)
    training = context.training(gate_descent(settings), context.run.phase("gates"))
    sparsity = Sparsity(settings.alpha, min(settings.tau, least), settings.gamma)
    return paper_scores(pruner, context.costs, training, sparsity)
