from dataclasses import replace

import numpy as np

from benchmarks.bench.baselines import BASELINES, compile_baselines, steps_at
from benchmarks.failures import one_line
from dipgo.base.errors import DipgoError
from dipgo.schedule.schedule import Schedule
from export.bundle import open_bundle


def test_all_compile_to_bundles_at_no_more_than_the_budget(task, tmp_path):
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


def test_fewer_steps_are_at_least_two(task):
    assert [steps_at(task, ratio) for ratio in (0.5, 0.35, 1.0, 0.01)] == [4, 3, 8, 2]


def test_one_that_crashes_is_listed_leaves_no_bundle_and_the_others_go_on(task, tmp_path):
    def wrong_sites(task, ratio):
        own, subnet = BASELINES["full"](task, ratio)
        return own, replace(subnet, sites=subnet.sites[:-1], schedule=Schedule(np.ones((8, 3), bool)))

    wrong, whole = compile_baselines(task, 0.5, tmp_path, {"wrong": wrong_sites, "full": BASELINES["full"]})
    assert "sites" in wrong.error
    assert wrong.folder is None
    assert list(tmp_path.iterdir()) == [whole.folder]
    assert one_line(DipgoError("mend\n it")) == "mend it"
    assert one_line(ValueError("a\nb")) == "ValueError: a b"
    assert one_line(KeyError()) == "KeyError"
