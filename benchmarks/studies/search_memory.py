"""Memory of the search, measured beside its estimate, and the estimate for the full size.

    python -m benchmarks.studies.search_memory sd-1.5 --latent 16 --steps 4 -o search-memory.json

The architecture's own code path runs on the CPU with random weights, at a smaller latent and with fewer steps: the
SuperNet, then learned backups, with and without recomputation. What is measured is the highest resident size of the
process above that with the weights loaded and a full trajectory run, so weights and pool are not in it. Linux only.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.studies.study import Study, StudyRecord, Words, run
from dipgo.base.process_memory import resident, resident_peak
from dipgo.graph.trace import trace
from dipgo.model.models import Model, find_model
from dipgo.schedule.fixed_schedules import EXTRAPOLATION, Rule, spaced
from dipgo.searching.backup_fit import Backups, learn_backups
from dipgo.searching.gate_training import paper_scores
from dipgo.searching.losses import final_latent
from dipgo.searching.memory import Iteration, memory_estimate
from dipgo.searching.pool import Pool
from dipgo.searching.pruner import Pruner
from dipgo.searching.run_folder import Run
from dipgo.searching.task import make_task
from dipgo.searching.training_loop import Descent, Training

FULL_STEPS, FULL_POOL = 50, 512
GIGA = 1e9


class SearchMemory(StudyRecord):
    """The result file: runs that were measured beside their estimates, and the estimates for the full size."""

    model: str
    sites: str
    weights: str
    measured: dict[str, Any]
    full_size: dict[str, Any]


def main(words: Words | None = None) -> None:
    study = Study("search_memory", __doc__, words)
    study.parser.add_argument("model")
    study.parser.add_argument("--sites", default="block")
    study.parser.add_argument("--latent", type=int, default=16, help="side of the latent that is measured")
    study.parser.add_argument("--steps", type=int, default=4, help="steps that are measured")
    study.parser.add_argument("--recomputed", action="store_true", help="leave out the runs without recomputation")
    options = study.options()
    _give_memory_back()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    full = find_model(options.model, random_weights=True)
    small = replace(full, config={**full.config, "sample_size": options.latent})
    estimated = _full_size(full, options.sites)
    runs = []
    for row in _measured(small, options.sites, options.steps, (True,) if options.recomputed else (True, False)):
        print(_line(row), flush=True)
        runs.append(row)
    study.write(
        SearchMemory(
            model=options.model,
            sites=options.sites,
            weights="random",
            measured={"latent": options.latent, "steps": options.steps, "batch": 1, "runs": runs},
            full_size=estimated,
            **study.origin(),
        )
    )
    for name, row in estimated["estimates"].items():
        print(f"full size, {name}: {row['total'] / GIGA:.1f} GB")


def _measured(model: Model, sites: str, steps: int, ways: Sequence[bool]) -> Iterator[dict[str, Any]]:
    task = make_task(model, steps, sites=sites)
    pool = Pool(task, 1, 1, seed=0, chunk=1)
    _ = pool[0]
    schedule = spaced(task.trace.macs, task.sampler.calls, 0.6, Rule(history=EXTRAPOLATION))
    for recompute in ways:
        pruner, backups = Pruner(task.sampler.calls, len(task.trace.sites)), Backups(task.trace, schedule)
        trajectory = task.with_trajectory(recompute=recompute).trajectory
        gates = Training(trajectory, pool, final_latent, Descent(2, 0.1, "sgd", clip=1.0), Run().phase("gates"))
        weights = replace(gates, descent=Descent(2, 1e-2), phase=Run().phase("backups"))
        for name, module, hard, learn in (
            ("SuperNet", pruner, None, partial(paper_scores, pruner, task.trace.macs, gates)),
            ("learned backups", backups, schedule.gates, partial(learn_backups, backups, weights)),
        ):
            learned = sum(parameter.numel() for parameter in module.parameters())
            iteration = Iteration(gates=hard, history=2, recompute=recompute, learned=learned, adam=hard is not None)
            estimate = memory_estimate(task.trace, task.sampler.calls, iteration)
            started = time.perf_counter()
            peak = _peak_above(learn)
            expected = estimate.total - estimate.weights - estimate.pool
            yield {
                "what": name,
                "recompute": recompute,
                "peak": peak,
                "estimate": expected,
                "parts": asdict(estimate),
                "ratio": round(expected / peak, 3),
                "seconds": round(time.perf_counter() - started, 1),
            }


def _full_size(model: Model, sites: str) -> dict[str, Any]:
    """Estimate 50 steps at the size of the configuration, in float32 and half precision, with a loss on images."""
    traced = trace(model, sites, 7.5)
    pruner = (
        FULL_STEPS * len(traced.sites) * (512 + 512 * 128 + 128 + 128 * 128 + 128 + 128 * 2 + 2)
    )  # queries and heads
    estimates = {}
    for name, precision in (("float32", None), ("half precision", torch.bfloat16)):
        iteration = Iteration(precision=precision, loss="ssim", learned=pruner, pool=FULL_POOL)
        estimate = memory_estimate(traced, FULL_STEPS, iteration)
        estimates[name] = {**asdict(estimate), "total": estimate.total}
    return {
        "steps": FULL_STEPS,
        "batch": 1,
        "guidance": 7.5,
        "latent": model.config["sample_size"],
        "pool": FULL_POOL,
        "loss": "ssim",
        "estimates": estimates,
    }


def _peak_above(run: Callable[[], object]) -> int:
    """Return by how many bytes the resident size rose above its start while ``run`` ran."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the kernel's high-water mark begins anew
    before = resident()
    run()
    return resident_peak() - before


def _give_memory_back() -> None:
    """Start again with an allocator that hands freed tensors back, so that the resident size is what is held."""
    if os.environ.get("MALLOC_MMAP_THRESHOLD_") is None:
        os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.studies.search_memory", *sys.argv[1:]])


def _line(row: dict[str, Any]) -> str:
    way = "recomputed" if row["recompute"] else "all kept"
    return (
        f"{row['what']}, {way}: {row['peak'] / GIGA:.2f} GB measured, {row['estimate'] / GIGA:.2f} GB estimated "
        f"(x {row['ratio']:.2f}), {row['seconds']:.0f} s"
    )


if __name__ == "__main__":
    run(main)
