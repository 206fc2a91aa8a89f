"""The loop: what it descends on, what stops it, how it goes on; in real processes where processes matter."""

import itertools
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
import torch

from dipgo.base.config import checked
from dipgo.model.models import find_model
from dipgo.schedule.fixed_schedules import EXTRAPOLATION, Rule, spaced
from dipgo.schedule.schedule import Schedule
from dipgo.schedule.subnet import load_subnet, weights_file
from dipgo.searching.backup_fit import Backups, learn_backups
from dipgo.searching.checkpoint import read_checkpoint
from dipgo.searching.config import SearchConfig
from dipgo.searching.distributed import processes
from dipgo.searching.gate_training import Sparsity, paper_scores
from dipgo.searching.losses import final_latent, make_loss
from dipgo.searching.pool import Pool
from dipgo.searching.pruner import Pruner
from dipgo.searching.run_folder import Run, open_run
from dipgo.searching.search import search
from dipgo.searching.task import make_task
from dipgo.searching.training_loop import Descent, Training, optimise
from tests import zoo
from tests.checks import ROOT, misused, refused, small_disk

STEPS = 6
SETTINGS = {"batch": 2, "pool": 8, "held_out": 2, "backup_iterations": 20}
SETTINGS |= {"drops": 3, "drops_on": 2, "contenders": 2, "trial_iterations": 2}


@pytest.fixture(scope="module")
def gates(task):
    return spaced(task.trace.macs, STEPS, 0.5, Rule(history=EXTRAPOLATION)).gates


def every(iterations, folder):
    """A run that keeps a checkpoint after so many iterations."""
    return replace(open_run(folder, {}), cadence=replace(Run().cadence, iterations=iterations))


def learnt(task, gates, descent, pool, run=None, loss=final_latent):
    backups = Backups(task.trace, Schedule(gates))
    learn_backups(backups, Training(task.trajectory, pool, loss, descent, (run or Run()).phase("backups")))
    return backups.schedule().backups


def interrupted_at(call):
    """A loss that is interrupted at that call."""
    calls = itertools.count(1)

    def loss(latents, target):
        if next(calls) == call:
            raise KeyboardInterrupt
        return final_latent(latents, target)

    return loss


def assert_close(first, second, tolerance):
    for name, array in first.items():
        assert np.abs(array - second[name]).max() <= tolerance, name


def test_rates():
    cosine = Descent(100, 0.5, warmup=4)
    assert [cosine.rate_at(k) for k in range(4)] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert cosine.rate_at(4) == 0.5
    assert cosine.rate_at(52) == pytest.approx(0.25)
    assert 0 < cosine.rate_at(99) < 0.001
    assert [Descent(9, 0.5, schedule="constant").rate_at(k) for k in (0, 8)] == [0.5, 0.5]
    parameter = torch.nn.Parameter(torch.zeros(1))
    torch_own = torch.optim.lr_scheduler.CosineAnnealingLR(torch.optim.SGD([parameter], lr=0.3), 20)
    for k in range(20):
        assert Descent(20, 0.3).rate_at(k) == pytest.approx(torch_own.get_last_lr()[0])
        torch_own.optimizer.step()
        torch_own.step()


def test_descents_that_make_no_sense():
    makes_no_sense = {"optimiser": "lion", "gate_schedule": "step", "accumulate": 0, "clip": -1, "gate_rate": math.nan}
    for name, value in makes_no_sense.items():
        with misused("."):
            checked(SearchConfig, {"steps": 4, "budget": 0.5, name: value})


@pytest.mark.parametrize(("optimiser", "loss"), [("adam", "latent"), ("sgd", "ssim+l1")])
def test_accumulation_equals_the_joint_batch(task, gates, optimiser, loss):
    """Batches 2k and 2k + 1 of two images make the update of one batch with all four."""
    descent = Descent(3, 2e-2 if optimiser == "adam" else 1.0, optimiser, clip=0.05)
    pairs = Pool(task, 0, 2, seed=1)

    class Joint:
        def __getitem__(self, number):
            (first, target), (second, other) = pairs[2 * number], pairs[2 * number + 1]
            labels = [batch.conditions["class_labels"].split(2) for batch in (first, second)]  # unconditional first
            conditions = {"class_labels": torch.cat([each[k] for k in (0, 1) for each in labels])}
            batch = replace(first, noise=torch.cat([first.noise, second.noise]), conditions=conditions)
            return batch, [torch.cat(parts) for parts in zip(target, other, strict=True)]

    measure = make_loss(loss, task.decode)
    parts = learnt(task, gates, replace(descent, accumulate=2), pairs, loss=measure)
    whole = learnt(task, gates, descent, Joint(), loss=measure)
    start = Backups(task.trace, Schedule(gates)).schedule().backups
    assert max(np.abs(whole[name] - start[name]).max() for name in start) > 1e-3
    assert_close(parts, whole, 1e-5)


def test_clipping_bounds_the_update(task):
    module = torch.nn.Linear(3, 1)
    before = torch.nn.utils.parameters_to_vector(module.parameters()).detach().clone()
    data, descent = 100 * torch.ones(2, 3), Descent(1, 1.0, "sgd", "constant", clip=0.5)
    optimise(module, lambda _: (module(data).square().sum(), {}), descent, Run().phase("p"), task.trajectory.device)
    moved = torch.nn.utils.parameters_to_vector(module.parameters()) - before
    assert moved.norm().item() == pytest.approx(0.5, rel=1e-4)


def test_float16_scales_the_loss_and_leaves_out_overflows(task):
    """A gradient that overflows only because of the scale costs an iteration and a halving, nothing else."""
    half = task.with_trajectory(precision=torch.float16).trajectory
    module = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(module.weight)
    values = []

    def loss_at(number):
        values.append(module.weight.item())
        # float16 on the way: its largest value, 65504, is below the first scale, 65536
        return (module.weight.sum().half() * 1).float(), {}

    optimise(module, loss_at, Descent(4, 0.25, "sgd", "constant"), Run().phase("p"), half.device, half.precision)
    assert values == [1.0, 1.0, 0.75, 0.5], "the first update overflowed, the others did not"


def test_float16_resumes_to_the_same_bits(task, gates, tmp_path):
    """The scale of the loss and its counters come back as they were."""
    half = task.with_trajectory(precision=torch.float16)

    def learnt_half(run, loss=final_latent):
        return learnt(half, gates, Descent(8, 1e-2), Pool(half, 8, 2, seed=3), run, loss)

    with pytest.raises(KeyboardInterrupt):
        learnt_half(every(2, tmp_path / "run"), interrupted_at(6))
    assert_close(learnt_half(open_run(tmp_path / "run", {}, resume=True)), learnt_half(Run()), 0)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_stops_and_keeps_the_last_checkpoint(task, gates, tmp_path, where):
    pool = Pool(task, 16, 2, seed=1)
    calls = 0

    def loss(latents, target):
        nonlocal calls
        calls += 1
        value = final_latent(latents, target)
        if calls < 6:
            return value
        return value * math.nan if where == "loss" else value + (0 * value).sqrt()  # the root's slope is infinite

    kept = f"the checkpoint of iteration 4 is kept in {tmp_path}/run/backups.safetensors"
    with refused(f"phase 'backups': the {where} is nan at iteration 6.*{kept}"):
        learnt(task, gates, Descent(9, 1e-2), pool, every(2, tmp_path / "run"), loss)
    files = {"backups.safetensors", "clock.json", "journal.jsonl", "lock", "run.json"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == files
    again = open_run(tmp_path / "run", {}, resume=True)
    resumed = learnt(task, gates, Descent(9, 1e-2), pool, again)
    straight = learnt(task, gates, Descent(9, 1e-2), pool)
    assert_close(resumed, straight, 0)


def test_the_gate_phase_resumes_to_the_same_bits(task, tmp_path):
    sgd, adam = Descent(8, 0.5, "sgd", clip=1.0, weight_decay=1e-4), Descent(8, 1e-2, schedule="constant")
    for folder, descent in ((tmp_path / "sgd", sgd), (tmp_path / "adam", adam)):

        def scores(run, loss=final_latent, descent=descent):
            torch.manual_seed(7)
            pruner = Pruner(STEPS, len(task.trace.sites), width=16, hidden=8, attention="both")
            training = Training(task.trajectory, Pool(task, 8, 2, seed=3), loss, descent, run.phase("gates"))
            return paper_scores(pruner, task.trace.macs, training)

        with pytest.raises(KeyboardInterrupt):
            scores(every(2, folder), interrupted_at(6))
        assert np.array_equal(scores(open_run(folder, {}, resume=True)), scores(Run()))
        lines = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
        assert [line["iteration"] for line in lines] == list(range(1, 9)), "no iteration is missing or told twice"
        assert {"phase", "loss", "kept", "rate", "seconds", "peak_memory"} <= lines[0].keys()


def test_tau_switches_the_sparsity_term(task):
    """With the threshold above what is kept, the loss is the consistency alone; below, α Σ γ g is added."""
    pool = Pool(task, 4, 2, seed=3)
    losses = {}
    for threshold, alpha, weighted in ((2.0, 1.0, True), (0.2, 1.0, True), (0.2, 0.5, False)):
        torch.manual_seed(7)
        pruner = Pruner(STEPS, len(task.trace.sites), width=16, hidden=8)
        told = []
        run = Run(report=lambda phase, k, total, figure, told=told: told.append(figure))
        training = Training(task.trajectory, pool, final_latent, Descent(1, 0.1, "sgd"), run.phase("gates"))
        paper_scores(pruner, task.trace.macs, training, Sparsity(alpha, threshold, weighted))
        losses[threshold, alpha] = float(told[0].split()[1].rstrip(","))
    assert losses[2.0, 1.0] == pytest.approx(0, abs=1e-6), "everything is kept at the start"
    assert losses[0.2, 1.0] == pytest.approx(1, abs=1e-3)
    assert losses[0.2, 0.5] == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("method", ["dipgo", "paper"])
def test_a_search_with_everything_switched_on(task, method, tmp_path):
    """Half precision, recomputation, a loss on images, accumulation, warm-up, attention both ways."""
    settings = {name: value for name, value in SETTINGS.items() if "iterations" not in name}
    settings |= {"gate_iterations": 3, "trial_iterations": 2, "backup_iterations": 3, "precision": "fp16"}
    settings |= {"loss": "0.5*ssim+l1+latent", "accumulate": 2, "warmup": 1, "attention": "both", "width": 16}
    settings |= {"recompute": True, "pool": 0, "heads": 2, "layers": 2, "hidden": 8}
    settings |= {"run_folder": tmp_path / "run", "tensorboard": True}
    subnet = search(task, SearchConfig(**{"steps": STEPS, "budget": 0.6, "method": method, **settings}))
    assert subnet.search.psnr_db == max(subnet.search.held_out_psnr_db.values())
    lines = [json.loads(line) for line in (tmp_path / "run" / "journal.jsonl").read_text().splitlines()]
    phase, count = ("gates", 3) if method == "paper" else ("trial-0.6-0", 3)
    assert [line["iteration"] for line in lines if line["phase"] == phase] == list(range(1, count + 1))
    assert all(0 < line["kept"] <= 1 and math.isfinite(line["loss"]) for line in lines)


def test_killed_twice_and_resumed_equals_uninterrupted(task, tmp_path):
    """SIGKILL in a trial, then when backups learn to the end; what comes out is the same to the last bit."""
    config = SearchConfig(**{"steps": STEPS, "budget": 0.6, **SETTINGS, "trial_iterations": 6})
    killed = config.changed(run_folder=tmp_path / "run", checkpoint_iterations=3)
    for phase, after, resume in (("trial-0.6-1", 5, False), ("backups-0.6", 10, True)):
        process = multiprocessing.get_context("fork").Process(target=search, args=(task, killed.changed(resume=resume)))
        process.start()
        journal = tmp_path / "run" / "journal.jsonl"
        deadline = time.time() + 120
        while time.time() < deadline and process.is_alive():
            text = journal.read_text() if journal.exists() else ""
            if f'"phase": "{phase}", "iteration": {after},' in text:
                break
            time.sleep(0.005)
        process.kill()
        process.join(30)
        assert process.exitcode == -signal.SIGKILL, "killed while it ran"
    killed = search(task, killed.changed(resume=True, checkpoint_iterations=5))
    straight = search(task, config)
    assert killed.schedule.learned
    assert np.array_equal(killed.gates, straight.gates)
    assert_close(killed.schedule.backups, straight.schedule.backups, 0)
    assert killed.search.held_out_psnr_db == straight.search.held_out_psnr_db


def test_a_finished_search_resumed_says_the_same(task, tmp_path):
    """The seconds that it took among the rest, though nothing is searched again."""
    config = zoo.search_config(STEPS, 0.6, run_folder=tmp_path / "run")
    first, again = search(task, config), search(task, config.changed(resume=True))
    assert again.search == first.search


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(task, gates, tmp_path):
    """A limit on the size of files stands for a disk that fills; it raises EFBIG."""
    path, calls = tmp_path / "run" / "backups.safetensors", 0

    with ExitStack() as limits:

        def loss(latents, target):
            nonlocal calls
            calls += 1
            if calls == 5:
                limits.enter_context(small_disk(3000))
            return final_latent(latents, target)

        with refused(f"{path}: the disk is full.*the checkpoint of iteration 3 is kept in {path}"):
            learnt(task, gates, Descent(9, 1e-2), Pool(task, 4, 2, seed=1), every(3, tmp_path / "run"), loss)
    assert read_checkpoint(path)[0].iteration == 3
    assert not [entry for entry in path.parent.iterdir() if entry.name.startswith(".")], "nothing half written"


def learn_both(model, images):
    """Learn backups and scores from ``images`` a batch, those of all processes together."""
    torch.set_num_threads(1)
    task = make_task(find_model(model), STEPS)
    group = processes(torch.device("cpu"))
    run = Run(processes=group)
    backups = Backups(task.trace, spaced(task.trace.macs, STEPS, 0.5, Rule(history=EXTRAPOLATION)))
    loss = make_loss("ssim+latent", task.decode)
    pool = Pool(task, 16, images // group.count, 1, group)
    descent = Descent(6, 2e-2, clip=0.1, accumulate=2)
    learn_backups(backups, Training(task.trajectory, pool, loss, descent, run.phase("b")))
    torch.manual_seed(group.rank)  # only the main process's parameters count
    pruner = Pruner(STEPS, len(task.trace.sites), width=16, hidden=8)
    training = Training(task.trajectory, pool, loss, Descent(4, 1e-2), run.phase("g"))
    return group, {**backups.schedule().backups, "scores": paper_scores(pruner, task.trace.macs, training)}


def launched(module, *arguments):
    """Run a module in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", module]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}
    arguments = map(str, arguments)
    return subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_two_processes_equal_one_with_the_joint_batch(tiny_dit, tmp_path):
    done = launched("tests.dipgo.test_optimise", tiny_dit, tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = (dict(np.load(tmp_path / f"{name}.npz")) for name in ("0-of-2", "1-of-2"))
    _, alone = learn_both(tiny_dit, 4)
    assert_close(first, second, 0)
    assert_close(first, alone, 1e-5)


@pytest.mark.slow
def test_two_processes_search_write_once_and_fail_in_one_line(tiny_dit, tmp_path):
    folder, output = tmp_path / "run", tmp_path / "s.json"
    settings = [f"--set={name}={value}" for name, value in (SETTINGS | {"backup_iterations": 5}).items()]
    options = ["--steps", STEPS, "--budget", 0.6, "--threads", 1, "--run-folder", folder, "-o", output]
    arguments = ["dipgo.cli.main", "search", tiny_dit, *options, *settings]
    done = launched(*arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("SubNet: ") == 1
    assert load_subnet(output).cost.ratio <= 0.6
    lines = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines if line["phase"] == "backups-0.6"] == [1, 2, 3, 4, 5]
    output.unlink()
    weights_file(output).unlink(missing_ok=True)
    done = launched(*arguments)
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if line.startswith("dipgo: ")] == [
        f"dipgo: {folder} exists; --resume goes on with it, or give another --run-folder"
    ]


if __name__ == "__main__":  # as a process of several
    group, arrays = learn_both(sys.argv[1], 4)
    np.savez(f"{sys.argv[2]}/{group.rank}-of-{group.count}.npz", **arrays)
