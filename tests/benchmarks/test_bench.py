import re
import shutil

import pytest
import torch

import dipgo
from benchmarks.bench.baselines import full, uniform_reuse
from benchmarks.bench.bench import bench
from benchmarks.bench.config import BenchConfig
from benchmarks.bench.page import table
from benchmarks.bench.plots import curves_of, points_of
from benchmarks.bench.subjects import PROMPTS
from benchmarks.bench.suite import Suite
from dipgo.base.progress import silent
from dipgo.schedule.subnet import load_subnet
from export.compiler import compile_subnet
from tests import zoo
from tests.benchmarks.test_parity import perturb_the_weights
from tests.checks import misused, refused
from tests.models import random_subnet


def test_every_program_is_measured_in_every_round(measured):
    report, _ = measured
    plain = ["fewer steps", "fewer steps, equal time", "fewer steps, DPM-Solver++ 2M"]
    plain += ["uniform reuse", "uniform extrapolation"]
    assert [row.name for row in report.rows] == ["full", "dipgo", *plain, "crash"]
    assert report.rounds == 4
    for row in report.rows[:-1]:
        assert row.error is None
        assert len(row.timing.samples) == 4
        assert row.parity.passed
        assert row.efficiency == pytest.approx(row.timing.speedup.median * row.macs_ratio)
        assert 0 < row.outside.median < 1
    full, own = report.rows[:2]  # the full program is the reference
    assert (full.macs, own.macs) == (report.cost.full, report.cost.subnet)
    assert own.macs_ratio == pytest.approx(report.cost.ratio)
    assert full.timing.speedup.median == 1
    assert own.quality.psnr_db < full.quality.psnr_db


def test_quality_is_shown_at_three_guidance_scales(measured):
    """At its own it is that of the same images elsewhere in the report."""
    report, folder = measured
    own = report.sampler.guidance_scale
    assert [each.guidance_scale for each in report.scales] == [own / 2, own, 1.5 * own]
    assert report.scales[1].image_psnr_db == pytest.approx(
        sum(report.row("dipgo").quality.each_psnr_db[:8]) / 8, abs=0.01
    )
    assert report.scales[0].image_psnr_db != report.scales[1].image_psnr_db
    assert f"{report.scales[0].image_psnr_db:.1f} dB at" in (folder / "report.html").read_text().replace("\n", " ")


def test_a_baseline_that_crashes_is_listed_with_its_error(measured):
    report, folder = measured
    row = report.row("crash")
    assert row.error == "RuntimeError: out of luck <b>"
    assert row.timing is row.quality is row.macs is None
    assert re.search("crash .*out of luck <b>", table(report))
    assert any("crash" in entry.line for entry in report.headline if entry.kind == "note")
    assert "out of luck &lt;b&gt;" in (folder / "report.html").read_text()


def test_the_table_has_a_line_a_program_then_parity(measured):
    report, _ = measured
    header, *lines, parity = table(report).splitlines()
    assert re.split(r"  +", header) == [
        *("program", "wall time", "speedup", "PSNR to full"),
        *("worst image", "MACs", "efficiency", "class accuracy"),
    ]
    assert len(lines) == len(report.rows)
    assert re.fullmatch(r"full: 8 steps of DDIMScheduler +\S+ ms +1\.00 +reference +100\.0% +1\.00", lines[0])
    assert re.fullmatch(r"dipgo +\S+ ms +\d+\.\d\d +\d+\.\d dB +\d+\.\d dB +\d+\.\d% +\d+\.\d\d", lines[1])
    assert parity.startswith("parity: relative error ")
    assert "denoising loop, batch 1, ONNX Runtime CPU, 1 thread" in parity


def test_a_wrong_program_gets_no_speed_and_no_report(bundle, tmp_path, capsys):
    wrong, output = tmp_path / "wrong", tmp_path / "out" / "report"
    shutil.copytree(bundle, wrong)
    perturb_the_weights(wrong)
    phases: set[str] = set()
    with refused(r"parity failed, relative error .* nothing was measured"):
        bench(wrong, output, BenchConfig(threads=1), progress=lambda phase, *_: phases.add(phase))
    assert "measure" not in phases
    assert "verify: compiled" in phases
    assert not output.parent.exists()
    assert capsys.readouterr().out == ""


def test_what_makes_no_report_is_refused_and_leaves_nothing(bundle, tmp_path):
    def crash(task, ratio):
        raise RuntimeError("no")

    with misused("images = 7: should be greater than or equal to 8"):
        dipgo.bench(bundle, tmp_path / "report", images=7, progress=False)
    with refused("full program cannot be measured"):
        bench(bundle, tmp_path / "report", BenchConfig(threads=1), progress=silent, baselines={"full": crash})
    assert not list(tmp_path.iterdir())
    (tmp_path / "keep.txt").write_text("mine")
    with misused("--force"):
        bench(bundle, tmp_path, progress=silent)
    assert (tmp_path / "keep.txt").read_text() == "mine"


def test_bundles_are_measured_beside_each_other(bundle, task, tmp_path):
    """Further ones, and other programs of the first, against its full program; no bundle of another sampler."""
    sampler = zoo.sampler("dit", 4, None)
    subnets = [load_subnet(bundle / "subnet.json"), random_subnet(task.trace, sampler, seed=2)]
    compile_subnet(subnets, task.trace.model, several := tmp_path / "several")
    less = zoo.bundle(task.trace, task.sampler, random_subnet(task.trace, task.sampler, seed=3, keep=0.3))
    suite = Suite(about="small", baselines=["eager torch", "fewer steps"], images=8, repeats=3, seconds=0, threads=1)
    report = dipgo.bench([several, less], tmp_path / "report", suite=suite.changed(scopes=["loop"]), progress=False)
    shorter = f"dipgo, 4 steps at {subnets[1].cost.ratio:.0%}"
    names = ["full", "dipgo", shorter, f"dipgo, {less}", "fewer steps", "eager torch"]
    assert [row.name for row in report.rows] == names
    own, short, other, fewer, eager = report.rows[1:]
    assert (short.steps, short.parity.passed) == (4, True)
    assert own.macs > other.macs
    assert other.parity.passed
    assert curves_of(points_of(report.rows)).keys() == {"dipgo", "steps of DDIMScheduler"}
    assert fewer.about == f"{fewer.steps} steps of DDIMScheduler"
    assert eager.over_eager.median == 1
    assert own.over_eager is None
    fewer_steps = zoo.bundle(task.trace, sampler, subnets[1])
    with misused(f"{fewer_steps}: of another sampler than {bundle}; measure it by itself"):
        dipgo.bench([bundle, fewer_steps], tmp_path / "other", progress=False)
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_prompts_are_benched_in_half_precision(tmp_path):
    """Baselines have the bundle's dtype; the page shows the prompts."""
    traced, sampler = zoo.trace("sd", dtype=torch.float16), zoo.sampler("sd", 4, None)
    bundle = zoo.bundle(traced, sampler, random_subnet(traced, sampler, seed=2))
    baselines = {"full": full, "uniform reuse": uniform_reuse}
    suite = Suite(about="small", images=8, repeats=3, seconds=0, threads=1, scopes=["loop"])
    report = bench(bundle, tmp_path / "report", BenchConfig(suite=suite), progress=silent, baselines=baselines)
    assert [row.error for row in report.rows] == [None] * 3
    assert {row.parity.dtype for row in report.rows} == {"float16"}
    assert all(row.parity.passed for row in report.rows)
    page = (tmp_path / "report" / "report.html").read_text()
    assert all(prompt in page for prompt in PROMPTS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dit", "sd"])
def test_a_denoiser_alone_is_benched_on_its_latents(kind, tmp_path):
    """Without a decoder in the bundle, the pipeline in torch leaves its own out too."""
    traced, sampler = zoo.trace(kind), zoo.sampler(kind, 4, None)
    bundle = zoo.bundle(traced, sampler, random_subnet(traced, sampler, seed=2), whole=False)
    little = {"images": 8, "repeats": 3, "seconds": 0, "threads": 1, "converged_images": 2, "converged_steps": 5}
    suite = Suite(about="small", baselines=["eager torch"], scopes=["loop", "pipeline"], **little)
    report = bench(bundle, tmp_path / "report", BenchConfig(suite=suite), progress=silent)
    assert report.parity.passed
    assert [row.error for row in report.rows] == [None] * 3
    eager = report.rows[-1]
    assert eager.quality.psnr_db > 80
    assert eager.quality.converged_psnr_db == pytest.approx(report.rows[0].quality.converged_psnr_db, abs=0.01)
