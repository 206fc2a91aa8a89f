from dataclasses import replace
from functools import partial

import numpy as np

from benchmarks.bench import solvers
from benchmarks.bench.baselines import BASELINES, Compiler, Share, baselines_for, steps_at
from benchmarks.bench.suite import Suite
from benchmarks.failures import one_line
from dipgo.base.errors import DipgoError
from dipgo.model.sampler import make_scheduler
from dipgo.schedule.schedule import Schedule
from export.bundle import open_bundle

HALF = Share(macs=0.5, time=0.75)


def test_all_compile_to_bundles_at_no_more_than_the_budget(task, tmp_path):
    compiler = Compiler(task, tmp_path)
    compiled = {name: compiler.compile(name, build, HALF) for name, build in BASELINES.items()}
    assert {name: entry.error for name, entry in compiled.items()} == dict.fromkeys(BASELINES)
    records = {name: open_bundle(entry.folder).record for name, entry in compiled.items() if entry.folder}
    full = records["full"].macs
    assert full == task.trace.macs.full * 8
    assert records["fewer steps"].macs == full / 2
    assert records["fewer steps, equal time"].macs == full * 3 / 4
    assert records["fewer steps, DPM-Solver++ 2M"].sampler.class_name == "DPMSolverMultistepScheduler"
    assert 0.4 * full < records["uniform reuse"].macs <= 0.5 * full
    assert 0.4 * full < records["uniform extrapolation"].macs <= 0.5 * full
    for name, learned in (("uniform reuse", False), ("uniform extrapolation", True)):
        tables = open_bundle(compiled[name].folder).tables
        assert any(table.startswith("backup.") for table in tables) == learned


def test_fewer_steps_are_at_least_two(task):
    assert [steps_at(task, ratio) for ratio in (0.5, 0.35, 1.0, 0.01)] == [4, 3, 8, 2]


def test_one_that_crashes_is_listed_leaves_no_bundle_and_the_others_go_on(task, tmp_path):
    def wrong_sites(task, share):
        own, subnet = BASELINES["full"](task, share)
        return own, replace(subnet, sites=subnet.sites[:-1], schedule=Schedule(np.ones((8, 3), bool)))

    compiler = Compiler(task, tmp_path)
    wrong, whole = (compiler.compile("x", build, HALF) for build in (wrong_sites, BASELINES["full"]))
    assert "sites" in wrong.error
    assert wrong.folder is None
    assert list(tmp_path.iterdir()) == [whole.folder]
    assert one_line(DipgoError("mend\n it")) == "mend it"
    assert one_line(ValueError("a\nb")) == "ValueError: a b"
    assert one_line(KeyError()) == "KeyError"


def test_what_would_be_the_same_program_is_there_once(task):
    """Steps at equal time that are as many as at equal MACs, and further step counts that these have already."""
    plain = ["fewer steps", "fewer steps, equal time", "best other solver", "best other solver, equal time"]
    suite = Suite(about="mine", baselines=[*plain, "eager torch"], steps=[4, 5, 6, 8], images=8)
    searched = task.subnet(Schedule(np.ones((8, len(task.trace.sites)), bool)))
    assert list(baselines_for(suite, searched, task, HALF)) == [*plain, "5 steps"]
    same = baselines_for(suite, searched, task, Share(macs=0.5, time=0.52))
    assert list(same) == [plain[0], plain[2], "5 steps", "6 steps"]
    own, subnet = same["best other solver"](task, HALF)
    assert own.sampler.name != task.sampler.name
    assert (own.sampler.calls, subnet.gates.all()) == (4, True)


def test_the_best_solver_is_the_closest_to_the_full_trajectory(task, monkeypatch):
    """Of two, one of which takes the noise for the image."""
    spoiled = partial(solvers._solver, alias="ddim", prediction_type="sample")
    monkeypatch.setattr(solvers, "SOLVERS", {"spoiled": spoiled, "DPM": solvers.dpm})
    for alias in ("unipc", "dpm++2m"):  # the task's own does not count
        own = task.with_sampler(make_scheduler(alias, task.pipe.scheduler), 8)
        best = solvers.best_solver(own, 4)
        assert best is (solvers.dpm if alias == "unipc" else spoiled)
