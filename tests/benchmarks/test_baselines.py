from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.bench.baselines import BASELINES, compile_baselines, steps_at
from benchmarks.failures import one_line
from dipgo.base.errors import DipgoError
from dipgo.model.models import find_model
from dipgo.schedule.schedule import Schedule
from dipgo.searching.task import Task, make_task
from export.bundle import open_bundle


def test_all_compile_to_bundles_at_no_more_than_the_budget(task: Task, tmp_path: Path):
    compiled = {entry.name: entry for entry in compile_baselines(task, 0.5, tmp_path)}
    assert {name: entry.error for name, entry in compiled.items()} == dict.fromkeys(BASELINES)
    records = {name: open_bundle(entry.folder).record for name, entry in compiled.items() if entry.folder}
    full = records["full"].macs
    assert full == task.trace.macs.full * 8
    assert records["fewer steps"].macs == full / 2
    assert records["fewer steps, DPM-Solver++ 2M"].sampler.class_name == "DPMSolverMultistepScheduler"
    assert 0.4 * full < records["uniform reuse"].macs <= 0.5 * full
    assert 0.4 * full < records["uniform extrapolation"].macs <= 0.5 * full
    for name, learned in (("uniform reuse", False), ("uniform extrapolation", True)):
        tables = open_bundle(compiled[name].folder).tables
        assert any(table.startswith("backup.") for table in tables) == learned


@pytest.mark.parametrize(("ratio", "steps"), [(0.5, 4), (0.35, 3), (1.0, 8), (0.01, 2)])
def test_fewer_steps_are_at_least_two(task: Task, ratio: float, steps: int):
    assert steps_at(task, ratio) == steps


def test_one_that_crashes_is_listed_and_the_others_go_on(tiny_dit: str, tmp_path: Path):
    # A setting that DDIM ignores and hands on, and that DPM-Solver++ refuses.
    copy = tmp_path / "model"
    shutil.copytree(tiny_dit, copy)
    file = copy / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "solver_type": "nonsense"}))
    compiled = compile_baselines(make_task(find_model(str(copy)), 4), 0.5, tmp_path / "bundles")
    failed = [entry for entry in compiled if entry.error]
    assert [entry.name for entry in failed] == ["fewer steps, DPM-Solver++ 2M"]
    assert "nonsense" in str(failed[0].error)
    assert failed[0].folder is None
    assert [entry.folder is not None for entry in compiled] == [True, True, False, True, True]


def test_what_fails_to_compile_leaves_no_bundle(task: Task, tmp_path: Path):
    def wrong_sites(task: Task, ratio: float):
        own, subnet = BASELINES["full"](task, ratio)
        return own, replace(subnet, sites=subnet.sites[:-1], schedule=Schedule(np.ones((8, 3), bool)))

    (entry,) = compile_baselines(task, 0.5, tmp_path, {"wrong": wrong_sites})
    assert "sites" in str(entry.error)
    assert not list(tmp_path.iterdir())


def test_errors_are_one_line():
    assert one_line(DipgoError("mend\n it")) == "mend it"
    assert one_line(ValueError("a\nb")) == "ValueError: a b"
    assert one_line(KeyError()) == "KeyError"
