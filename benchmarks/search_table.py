"""What searches find against every fixed policy, at equal MACs and on held-out noise; run in torch, without engines.

dipgo search digits-dit --steps 20 --budget 0.5,0.35,0.25,0.2 -o build/search
dipgo search digits-dit --steps 20 --budget 0.5,0.35,0.25,0.2 --method paper -o build/paper
python -m benchmarks.search_table build/search --paper build/paper -o benchmarks/results/search-digits-dit-ddim.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.environment import environment, load_average
from benchmarks.quality import SEED, class_accuracy, image_psnr, is_digits, psnr
from benchmarks.readme import README, put_between
from benchmarks.reference import converged as converged_task
from benchmarks.search_record import CONVERGED_STEPS, Cell, TableRecord, markdown
from dipgo.errors import DipgoError
from dipgo.files import new_file
from dipgo.models import find_model
from dipgo.sampler import make_scheduler
from dipgo.search.policies import measure_drift, policies
from dipgo.search.search import policy_subnet
from dipgo.search.task import Task, make_task
from dipgo.subnet import SubNet, load_subnet
from dipgo.trajectory import Batch

CHUNK = 32
PLAIN = ("uniform reuse, inside", "uniform extrapolation, inside")


class Judge:
    """Holds the noise, the full trajectory's images and the converged ones."""

    def __init__(self, task: Task, images: int, converged: int) -> None:
        self.task = task
        self._tasks = {task.trace.sites: task}
        self.batches = [task.sampling.draw(CHUNK, SEED + number) for number in range(-(-images // CHUNK))]
        self.reference = self.full(task)
        self.labels = np.concatenate([_labels(batch) for batch in self.batches])
        long = -(-converged // CHUNK)
        self.converged = self.full(converged_task(task, CONVERGED_STEPS), long) if converged else None

    def full(self, task: Task, batches: int | None = None) -> np.ndarray:
        """Return images of the full model under ``task``'s sampler, ``[n, height, width, channels]`` in [0, 1]."""
        found = []
        for batch in tqdm(self.batches[:batches], desc=f"full, {task.sampler.steps} steps", leave=False):
            found.append(self._images(task.trajectory.full(batch.noise, batch.conditions)[-1]))
        return np.concatenate(found)

    def on_sites_of(self, subnet: SubNet) -> Task:
        """Return the task on a SubNet's sites, which may be of another granularity than the one given."""
        if subnet.sites not in self._tasks:
            self._tasks[subnet.sites] = self.task.with_sites(",".join(site.name for site in subnet.sites))
        return self._tasks[subnet.sites]

    def found(self, subnet: SubNet) -> np.ndarray:
        """Return the images of a SubNet."""
        trajectory = self.on_sites_of(subnet).trajectory
        tensors = {name: torch.from_numpy(array) for name, array in subnet.weights.items()}
        found = []
        with torch.no_grad():
            for batch in self.batches:
                latents = trajectory.gated(batch.noise, batch.conditions, subnet.gates, tensors, subnet.terms)
                found.append(self._images(latents[-1]))
        return np.concatenate(found)

    def cell(self, row: str, budget: float, ratio: float, images: np.ndarray, **more: object) -> Cell:
        close = None
        if self.converged is not None:
            close = psnr(images[: len(self.converged)], self.converged)
        return Cell(
            row=row,
            budget=budget,
            macs_ratio=round(ratio, 4),
            psnr_db=psnr(images, self.reference),
            image_psnr_db=float(image_psnr(images, self.reference).mean()),
            converged_db=close,
            class_accuracy=self.accuracy(images),
            **more,
        )

    def accuracy(self, images: np.ndarray) -> float | None:
        return class_accuracy(images, self.labels.tolist()) if is_digits(self.task.model.name, images) else None

    def _images(self, latent: torch.Tensor) -> np.ndarray:
        with torch.no_grad():
            decoded = self.task.decode(latent)
        return (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def cells(judge: Judge, found: list[SubNet], paper: list[SubNet]) -> Iterator[Cell]:
    """Yield all rows of the budgets that ``found`` was searched for, fixed policies on the sites of each."""
    for subnet in found:
        task = judge.on_sites_of(subnet)
        calls = task.sampler.calls
        drift = measure_drift(task.trajectory, task.sampling.draw(8, 3_000_000))
        budget = float(subnet.search["budget"])
        steps = max(2, round(task.sampler.steps * budget))
        same = task.with_sampler(make_scheduler(task.sampler.name, task.pipe.scheduler), steps)
        yield judge.cell("fewer steps, same solver", budget, steps / calls, judge.full(same))
        if task.sampler.name != "DPMSolverMultistepScheduler":
            dpm = task.with_sampler(make_scheduler("dpm++2m", task.pipe.scheduler), steps)
            yield judge.cell("fewer steps, DPM-Solver++ 2M", budget, steps / calls, judge.full(dpm))
        scores = subnet.search["held_out_psnr_db"]
        fixed = {policy.name: policy for policy in policies(task.trace, calls, budget, drift)}
        chosen = {name: name for name in PLAIN if name in fixed}
        deep = [name for name in fixed if name.startswith("DeepCache")]
        if deep:
            chosen["DeepCache-like, the best"] = max(deep, key=lambda name: scores.get(name, -np.inf))
        chosen["best fixed policy of all"] = max(fixed, key=lambda name: scores.get(name, -np.inf))
        for row, name in chosen.items():
            policy = policy_subnet(task, fixed[name])
            ratio, images = policy.cost.ratio, judge.found(policy)
            yield judge.cell(row.removesuffix(", inside"), budget, ratio, images, what=name)
        for row, subnets in (("the paper's method", paper), ("**dipgo**", [subnet])):
            for one in subnets:
                if float(one.search["budget"]) == budget:
                    yield judge.cell(
                        row,
                        budget,
                        one.cost.ratio,
                        judge.found(one),
                        what=one.search["chosen"],
                        search_seconds=one.search["seconds"],
                    )


def load_folder(folder: Path) -> list[SubNet]:
    """Return the SubNets in a folder, the largest budget first."""
    subnets = [load_subnet(path) for path in sorted(folder.glob("*.json")) if path.stem[:1].isdigit()]
    if not subnets:
        raise DipgoError(f"{folder}: no SubNet in it; write some with dipgo search --budget 0.5,0.25 -o {folder}")
    return sorted(subnets, key=lambda subnet: -float(subnet.search["budget"]))


def _labels(batch: Batch) -> np.ndarray:
    labels = batch.conditions.get("class_labels")
    if labels is None:
        return np.zeros(len(batch.noise), int)
    return labels[-len(batch.noise) :].numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("searched", type=Path, help="folder with one SubNet a budget")
    parser.add_argument("--paper", type=Path, help="the same, by the paper's method")
    parser.add_argument("--prompts", type=Path, help="what to judge on, one a line, where prompts condition")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--converged", type=int, default=64, help="images of the 500-step trajectory; 0 for none")
    parser.add_argument("--publish", metavar="MARKER", help="put the table into the README, between these markers")
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    load = load_average()
    found = load_folder(arguments.searched)
    paper = load_folder(arguments.paper) if arguments.paper else []
    first = found[0]
    task = make_task(
        find_model(first.model.name),
        first.sampler.steps,
        first.sampler.class_name,
        ",".join(site.name for site in first.sites),
        first.sampler.guidance_scale,
        prompts=arguments.prompts,
    )
    judge = Judge(task, arguments.images, arguments.converged)
    table = []
    for cell in cells(judge, found, paper):
        table.append(cell)
        print(f"{cell.budget:g}  {cell.row}: {cell.psnr_db:.2f} dB  {cell.what}", flush=True)
    record = TableRecord(
        command="python -m benchmarks.search_table " + " ".join(sys.argv[1:]),
        model=first.model,
        sampler=first.sampler,
        images=len(judge.reference),
        converged_images=0 if judge.converged is None else len(judge.converged),
        prompts=len(set(task.sampling.choices)) if task.model.family.conditioned_by == "prompt" else 0,
        full_class_accuracy=judge.accuracy(judge.reference),
        full_converged_db=None
        if judge.converged is None
        else psnr(judge.reference[: len(judge.converged)], judge.converged),
        cells=table,
        environment=environment(load),
    )
    with new_file(arguments.output) as draft:
        draft.write_text(record.text())
    source = str(arguments.output)
    print(markdown(record, source))
    if arguments.publish:
        put_between(README, arguments.publish, markdown(record, source))


if __name__ == "__main__":
    main()
