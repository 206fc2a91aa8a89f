"""The tables of what searches find: rows, budgets, and SubNets of other sites than the table's."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from benchmarks.bench.quality import image_psnr, psnr
from benchmarks.bench.reference import converged
from benchmarks.studies import search_table, study
from benchmarks.studies.search_judge import Judge
from benchmarks.studies.search_record import BEST, DIPGO, PAPER, Cell, TableRecord, markdown
from benchmarks.studies.search_table import cells, check_same, read_table
from dipgo.eager.gating import gated
from dipgo.schedule.fixed_schedules import fixed_schedules
from dipgo.schedule.search_record import BudgetKind
from dipgo.searching.context import drift_of
from tests import zoo
from tests.checks import refused

STEPS, BUDGET = 6, 0.6


@pytest.fixture(scope="module")
def judge():
    return Judge(zoo.task("dit", STEPS, sites="layer"), images=1, converged=0)


def searched(sites):
    """A SubNet as a search would write it."""
    task = zoo.task("dit", STEPS, sites=sites)
    name, schedule = next(iter(fixed_schedules(task.trace.macs, STEPS, BUDGET).items()))
    return task.subnet(schedule, budget=BUDGET, chosen=name, seconds=1.0, held_out_psnr_db={name: 1.0})


def test_a_subnet_of_other_sites_gives_its_own_images(judge):
    """Against the gated denoiser of the pipeline itself."""
    subnet = searched("block")
    assert subnet.sites != judge.task.trajectory.sites
    task, batch = judge.task, judge.batches[0]
    scheduler = task.pipe.scheduler
    scheduler.set_timesteps(STEPS)
    latent = batch.noise * scheduler.init_noise_sigma
    with torch.no_grad(), gated(task.pipe.transformer, subnet):
        for timestep in scheduler.timesteps:
            epsilon = task.trajectory.guided(latent, timestep.expand(len(latent)), batch.conditions)
            latent = scheduler.step(epsilon, timestep, latent).prev_sample
        images = (task.decode(latent) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert np.allclose(judge.images_of(subnet), images, atol=1e-4)


def test_every_row_is_there_at_the_budget(judge):
    ours, paper = searched("layer"), searched("block")
    found = {cell.row: cell for cell in cells(judge, [ours], [paper])}
    plain = {"fewer steps, same solver", "fewer steps, DPM-Solver++ 2M", "uniform reuse", BEST}
    assert plain | {PAPER, DIPGO} <= found.keys()
    assert found["**dipgo**"].macs_ratio == pytest.approx(ours.cost.ratio, abs=1e-4)
    assert found["**dipgo**"].psnr_db == psnr(judge.images_of(ours), judge.reference)
    assert found["the paper's method"].macs_ratio == pytest.approx(paper.cost.ratio, abs=1e-4)
    assert all(cell.macs_ratio <= BUDGET + 0.1 for cell in found.values())


@pytest.mark.slow
def test_policies_of_an_earlier_table_are_not_judged_again(judge):
    ours = searched("layer")
    record = read_table(next(Path("benchmarks/results").glob("search-digits*.json")))
    first = list(cells(judge, [ours], []))
    earlier = record.model_copy(update={"cells": first})
    assert list(cells(judge, [ours], [], earlier)) == first
    marked = [cell.model_copy(update={"what": "earlier"}) for cell in first]
    again = list(cells(judge, [ours], [], record.model_copy(update={"cells": marked})))
    taken = {cell.row for cell in again if cell.what == "earlier"}
    assert taken == {"uniform reuse", "uniform extrapolation", "DeepCache-like, the best", "best fixed policy of all"}
    other = [cell.model_copy(update={"image_psnr_db": cell.image_psnr_db + 0.1}) for cell in first]
    with refused(r"'uniform reuse' has .* leave out --policies-of"):
        list(cells(judge, [ours], [], record.model_copy(update={"cells": other})))
    fewer = [cell.model_copy(update={"each_psnr_db": cell.each_psnr_db[1:]}) for cell in first]
    with refused(r"of \d+ images at 0\.6, this one is of \d+; give the same --images"):
        list(cells(judge, [ours], [], record.model_copy(update={"cells": fewer})))
    with refused(r"no fixed policies at 0\.6"):
        list(cells(judge, [ours], [], record))


def test_what_is_no_table_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        study.run(lambda: search_table.main([str(tmp_path), "-o", str(tmp_path / "x.json")]))
    (line,) = capsys.readouterr().err.splitlines()
    assert f": {tmp_path}: no SubNet in it" in line
    assert not (tmp_path / "x.json").exists()
    with refused("no such table of searches"):
        read_table(tmp_path / "none.json")
    (tmp_path / "some.json").write_text("{}")
    with refused(r"not a table of searches \(command is missing\)"):
        read_table(tmp_path / "some.json")


def test_the_best_fixed_policy_is_the_best_of_all(judge):
    """Each figure is the highest of any fixed schedule, whatever the search noted about them."""
    fixed = fixed_schedules(judge.task.trace.macs, STEPS, BUDGET, drift_of(judge.task, 0))
    ours = searched("layer")
    noted = {name: 1.0 if "late" in name else 20.0 for name in fixed}
    ours = replace(ours, search=ours.search.model_copy(update={"held_out_psnr_db": noted}))
    best = next(cell for cell in cells(judge, [ours], []) if cell.row == "best fixed policy of all")
    images = {name: judge.images_of(judge.task.subnet(schedule)) for name, schedule in fixed.items()}
    assert best.psnr_db == max(psnr(each, judge.reference) for each in images.values())
    assert best.image_psnr_db == max(image_psnr(each, judge.reference).mean() for each in images.values())
    assert best.psnr_db == psnr(images[best.what], judge.reference)


@pytest.mark.slow
def test_whole_steps_count_among_fixed_policies():
    """Where no site makes the output, as inside the blocks of a UNet, all schedules compute something in every step."""
    sites = "*_blocks.*.resnets.*,*_blocks.*.*samplers.*,*_blocks.*.attentions.*.transformer_blocks.*,mid_block"
    judge = Judge(zoo.task("sd", STEPS, "ddim", sites), images=1, converged=0)
    assert not judge.task.trace.output_sites()
    schedule = next(iter(fixed_schedules(judge.task.trace.macs, STEPS, BUDGET).values()))
    ours = judge.task.subnet(schedule, budget=BUDGET, chosen="", seconds=1.0)
    best = next(cell for cell in cells(judge, [ours], []) if cell.row == "best fixed policy of all")
    blocks = judge.task.with_sites("block")
    fixed = fixed_schedules(blocks.trace.macs, STEPS, BUDGET)
    whole = [name for name in fixed if "reuse, whole" in name]
    assert any(name.endswith("plain") for name in whole)
    figures = [psnr(judge.images_of(blocks.subnet(fixed[name])), judge.reference) for name in whole]
    assert best.psnr_db >= max(figures)


def test_the_lead_is_of_the_same_images():
    """A lead of 1 dB on each image is one, however far apart the images are; a row without theirs has none."""
    generator = np.random.default_rng(0)
    theirs = generator.normal(30, 10, 64)
    ours = theirs + generator.normal(1, 0.1, 64)
    rows = {BEST: theirs.tolist(), PAPER: [], DIPGO: ours.tolist()}
    table = [cell(row, each) for row, each in rows.items()]
    record = TableRecord.model_validate_json(next(Path("benchmarks/results").glob("search-digits*.json")).read_text())
    lines = markdown(record.model_copy(update={"cells": table}), "x.json").splitlines()
    (lead,) = [line for line in lines if line.startswith("| dipgo over")]
    assert re.fullmatch(r"\| dipgo over best fixed policy of all, in the mean \| 1\.0 \(1\.0 to 1\.0\) \|", lead)


def cell(row, each):
    mean = float(np.mean(each)) if each else 0.0
    figures = {"psnr_db": mean, "image_psnr_db": mean, "each_psnr_db": each}
    return Cell(row=row, budget=0.5, macs_ratio=0.5, converged_db=None, class_accuracy=None, **figures)


def test_a_table_is_of_one_model_and_sampler(judge):
    ours = searched("layer")
    check_same([ours, searched("block")], judge.task.model)
    other = replace(ours, sampler=ours.sampler.model_copy(update={"guidance_scale": 9.0}))
    with refused(r"6 steps of DDIMScheduler at guidance 9 beside"):
        check_same([ours, other], judge.task.model)
    timed = replace(ours, search=ours.search.model_copy(update={"cost": BudgetKind(kind="latency")}))
    with refused("whose budget is of latency; a table is at equal MACs"):
        check_same([ours, timed], judge.task.model)
    foreign = replace(ours, model=ours.model.model_copy(update={"weights_sha256": "0" * 64}))
    with refused("its weights"):
        check_same([ours, foreign], judge.task.model)


def test_the_converged_reference_never_clips():
    """Not even where the pipeline's own scheduler does."""
    task = zoo.task("dit", STEPS)
    task.pipe.scheduler = DDIMScheduler(clip_sample=True)
    long = converged(task, 40).sampler
    assert (long.name, long.steps, long.config["clip_sample"]) == ("DDIMScheduler", 40, False)
