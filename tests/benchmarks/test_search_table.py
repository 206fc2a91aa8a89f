"""The tables of what searches find: rows, budgets, and SubNets of other sites than the table's."""

import numpy as np
import pytest
import torch

from benchmarks.quality import psnr
from benchmarks.search_table import Judge, cells, load_folder
from dipgo.errors import DipgoError
from dipgo.gating import gated
from dipgo.models import find_model
from dipgo.search.policies import Policy, policies
from dipgo.search.search import policy_subnet
from dipgo.search.task import make_task

STEPS, BUDGET = 6, 0.6


@pytest.fixture(scope="module")
def judge(tiny_dit):
    return Judge(make_task(find_model(tiny_dit), STEPS, sites="layer"), images=1, converged=0)


def searched(tiny_dit, sites):
    """A SubNet as a search would write it."""
    task = make_task(find_model(tiny_dit), STEPS, sites=sites)
    found: Policy = policies(task.trace, STEPS, BUDGET)[0]
    subnet = policy_subnet(task, found)
    subnet.search.update(budget=BUDGET, chosen=found.name, seconds=1.0, held_out_psnr_db={found.name: 1.0})
    return subnet


def test_a_subnet_of_other_sites_gives_its_own_images(tiny_dit, judge):
    """Against the gated denoiser of the pipeline itself."""
    subnet = searched(tiny_dit, "block")
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
    assert np.allclose(judge.found(subnet), images, atol=1e-4)


def test_every_row_is_there_at_the_budget(tiny_dit, judge):
    ours, paper = searched(tiny_dit, "layer"), searched(tiny_dit, "block")
    found = {cell.row: cell for cell in cells(judge, [ours], [paper])}
    assert {
        "fewer steps, same solver",
        "fewer steps, DPM-Solver++ 2M",
        "uniform reuse",
        "best fixed policy of all",
        "the paper's method",
        "**dipgo**",
    } <= found.keys()
    assert found["**dipgo**"].macs_ratio == pytest.approx(ours.cost.ratio, abs=1e-4)
    assert found["**dipgo**"].psnr_db == psnr(judge.found(ours), judge.reference)
    assert found["the paper's method"].macs_ratio == pytest.approx(paper.cost.ratio, abs=1e-4)
    assert all(cell.macs_ratio <= BUDGET + 0.1 for cell in found.values())


def test_a_folder_without_subnets_is_refused(tmp_path):
    with pytest.raises(DipgoError, match="no SubNet"):
        load_folder(tmp_path)
