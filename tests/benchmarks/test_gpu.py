"""The GPU benchmark, tried on the CPU with small configurations: real processes, and what goes wrong in them."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
import weakref
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import MagicMock

import jsonschema
import numpy as np
import psutil
import pytest
import torch

from benchmarks.bench.timing import Spread, paired, spread
from benchmarks.gpu import records, worker
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.cases import OURS, WORKLOADS, cases, workloads
from benchmarks.gpu.clock import time_pair
from benchmarks.gpu.cut import cut, values_of
from benchmarks.gpu.loop import Loop, captured, lay_out
from benchmarks.gpu.page import headlines, markdown
from benchmarks.gpu.programs import Programs
from benchmarks.gpu.records import CaseRecord, Figures, GpuReport, Parity, read_gpu_report
from benchmarks.gpu.worker import Request, work
from dipgo.eager.trajectory import Trajectory
from dipgo.model.families import GuidedDenoiser, join
from dipgo.model.models import find_model
from dipgo.searching.task import Task
from export.compiler import normalise
from tests.models import random_subnet

ROOT = Path(__file__).parents[2]
SCHEMA_FILE = ROOT / "benchmarks" / "gpu" / "schema.json"
QUICK = ["--repeats", "3", "--pair-seconds", "0.1"]


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", "--tiny", *QUICK, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def validated(folder: Path) -> GpuReport:
    document = json.loads((folder / "report.json").read_text())
    jsonschema.validate(document, json.loads(SCHEMA_FILE.read_text()))
    return read_gpu_report(folder / "report.json")


def test_schema_is_the_published_one():
    assert SCHEMA_FILE.read_text() == records.json_schema()


def test_what_matters_most_comes_first():
    names = [case.name for case in cases(WORKLOADS, ["onnxruntime-cuda", "tensorrt"])]
    assert names[0] == "sd-1.5/b1/cuda-graph/published"
    assert len(set(names)) == len(names)
    first = [name for name in names if name.startswith("sd-1.5/b1/")]
    assert names[: len(first)] == first
    batches = [int(name.split("/")[1][1:]) for name in names]
    assert batches == sorted(batches)
    assert {"sd-1.5/b1/tensorrt/mixed", "sdxl/b8/cuda-graph/deepcache-5", "dit-xl-2/b1/diffusers-compile/full"} <= {
        *names
    }
    assert not [name for name in names if name.startswith("dit") and "deepcache" in name]


def test_only_takes_starts_of_names_and_stars():
    found = [case.name for case in cases(workloads(True, False), [], "dit-xl-2/b1/eager/fewer,*/cuda-graph/published")]
    assert found == ["sd-1.5/b1/cuda-graph/published", "dit-xl-2/b1/eager/fewer-steps"]


@pytest.mark.parametrize(("terms", "channels"), [(1, None), (2, 2), (3, 0)])
def test_the_loop_does_what_torch_does_under_the_same_gates(task: Task, terms, channels):
    """Cut modules and a laid-out loop against the model's own code, intercepted module by module."""
    traced, denoiser = task.trace, task.trajectory.guided.denoiser
    family = task.trace.model.family
    conditions = join(*family.conditions(task.pipe, [1, 2]), True)
    guided = GuidedDenoiser(denoiser, family, traced.guidance_scale)
    noise = torch.randn(traced.model.latent_shape(2), generator=torch.Generator().manual_seed(5))
    values = values_of(traced, denoiser, torch.device("cpu"))
    for seed in range(3):
        subnet = normalise(random_subnet(traced, task.sampler, seed, 0.4, terms, channels), traced)
        launches = lay_out(traced, subnet)
        steps = {
            launch.signature: cut(
                traced,
                launch.signature.served,
                launch.signature.stored,
                terms if subnet.weights else 0,
                values,
                torch.device("cpu"),
            )
            for launch in launches
        }
        loop = Loop(traced, subnet, task.sampler, launches, steps, 2, torch.device("cpu"))
        weights = {name: torch.from_numpy(array) for name, array in subnet.weights.items()}
        with torch.no_grad():
            found = loop(noise, conditions)
            trajectory = Trajectory(guided, traced.sites, task.sampler)
            expected = trajectory.gated(noise, conditions, subnet.gates, weights, subnet.terms)[-1]
        assert float((found - expected).norm() / expected.norm()) < 1e-5


def test_what_feeds_a_skipped_site_alone_is_not_there(task: Task):
    """With every site served nothing of the blocks is left but the last site's way to ε."""
    traced = task.trace
    values = values_of(traced, task.trajectory.guided.denoiser, torch.device("cpu"))

    def products(served, stored=()):
        module = cut(traced, served, stored, 0, values, torch.device("cpu"))
        called = [str(node.target) for node in module.graph.nodes if node.op == "call_function"]
        return sum("linear" in name or "conv" in name for name in called)

    last = traced.execution_order()[-1]
    everything, only_last = products(()), products((last,))
    assert products(range(len(traced.sites))) <= only_last < everything
    inner = [site for site in range(len(traced.sites)) if site != last]
    assert products((last,), tuple(inner)) > only_last  # what is stored is computed, though ε has no use for it


def test_pairs_are_timed_in_turns():
    order: list[str] = []
    own, other = time_pair(lambda: order.append("a"), lambda: order.append("b"), (False, False), 4, 60)
    assert order == list("ab" + "abbaabba")
    assert len(own.wall) == len(other.wall) == 4
    assert own.device == []
    assert spread(paired([2.0, 4.0, 6.0], [1.0, 1.0, 1.0])).median == 4


def test_a_process_measures_what_it_can_and_says_what_it_cannot(tmp_path):
    folder = tmp_path / "report"
    only = ",".join(
        f"dit-xl-2/b1/{pair}" for pair in ("eager/whole", "compile/mixed", "cuda-graph/whole", "onnxruntime/whole")
    )
    process = start("-o", folder, "--only", only)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    report = validated(folder)
    found = {case.name.removeprefix("dit-xl-2/b1/"): case for case in report.cases if case.model == "dit-xl-2"}
    assert found["cuda-graph/whole-steps"].status == "skipped"
    assert found["cuda-graph/whole-steps"].error == "needs CUDA"
    for name in ("eager/whole-steps", "compile/mixed", "onnxruntime/whole-steps"):
        case = found[name]
        assert case.status == "measured", case.error
        assert case.parity is not None
        assert case.parity.passed
        assert case.rounds == 3
        assert case.speedup is not None
        assert case.macs_ratio is not None
        assert case.efficiency == pytest.approx(case.speedup.median * case.macs_ratio)
        assert case.speedup.p5 <= case.speedup.median <= case.speedup.p95
        assert 0.1 < case.macs_ratio < 0.36
    assert report.calls[0].seconds is not None
    assert out.splitlines() == report.headline
    page = (folder / "report.md").read_text()
    assert page == markdown(report)
    assert "skipped: needs CUDA" in page


def test_a_killed_call_loses_nothing_and_goes_on(tmp_path):
    folder = tmp_path / "report"
    only = ["--only", "dit-xl-2/b1/cuda-graph/whole,dit-xl-2/b1/eager/whole,dit-xl-2/b1/eager/fewer"]
    process = start("-o", folder, *only)
    workers: list[psutil.Process] = []
    until = time.monotonic() + 300
    while time.monotonic() < until and process.poll() is None:
        workers = psutil.Process(process.pid).children() or workers
        file = folder / "report.json"
        if file.exists() and "measured" in {case.status for case in read_gpu_report(file).cases}:
            break
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    before = validated(folder)
    assert [case.status for case in before.cases] == ["skipped", "measured", "not reached"]
    assert before.calls[0].seconds is None
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive

    process = start("--resume", folder, *only)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    after = validated(folder)
    assert [case.status for case in after.cases] == ["skipped", "measured", "measured"]
    assert after.cases[1] == before.cases[1]  # kept as it was
    assert [case.call for case in after.cases] == [1, 0, 1]
    assert len(after.calls) == 2


def test_limits_end_what_takes_too_long(tmp_path):
    only = ["--only", "dit-xl-2/b1/eager"]
    process = start("-o", tmp_path / "case", *only, "--case-seconds", "0.5")
    process.communicate(timeout=120)
    assert process.returncode == 0
    report = validated(tmp_path / "case")
    assert {(case.status, case.error) for case in report.cases} == {("failed", "took longer than 0.5 s")}

    process = start("-o", tmp_path / "all", *only, "--seconds", "0.5")
    process.communicate(timeout=120)
    assert process.returncode == 0
    report = validated(tmp_path / "all")
    assert {case.status for case in report.cases} == {"not reached"}
    assert report.headline[-1].startswith(f"Not reached: {len(report.cases)} of {len(report.cases)} cases")


def test_what_fails_is_listed_and_what_is_wrong_has_no_speed(monkeypatch):
    """One program raises, another computes something else: the pairs around them go on."""
    build = Programs._build

    def tampered(self, backend, program):
        if program == "mixed":
            raise RuntimeError("out of\nluck")
        built = build(self, backend, program)
        if program == "fewer-steps":
            honest = built.run
            object.__setattr__(built, "run", lambda: 1.01 * honest())
        return built

    monkeypatch.setattr(Programs, "_build", tampered)
    load = next(each for each in workloads(True, False) if each.model == "dit-xl-2")
    pairs = [("eager", program, "eager") for program in ("mixed", "fewer-steps", "whole-steps")]
    messages: list[dict] = []
    work(Request(load, pairs, True, 3, 0.1), messages.append)
    found = [CaseRecord.model_validate(message["case"]) for message in messages if "case" in message]
    assert [message["begin"].rpartition("/")[2] for message in messages if "begin" in message] == [
        "mixed",
        "fewer-steps",
        "whole-steps",
    ]
    assert (found[0].status, found[0].error) == ("failed", "RuntimeError: out of luck")
    assert found[1].status == "failed"
    assert found[1].error is not None
    assert found[1].error.startswith("parity of fewer-steps: relative error 1.0e-02")
    assert found[1].speedup is None
    assert found[2].status == "measured"


def test_a_request_survives_the_way_to_the_worker():
    request = Request(WORKLOADS[0], [("eager", "full", "diffusers")], True, 5, 2.0)
    assert worker.request_from(request.text()) == request


def made(backend: str, program: str, speedup: float, ratio: float) -> CaseRecord:
    spread = Spread(median=speedup, p5=speedup, p95=speedup)
    figures = Figures(wall=spread, device=None, peak_bytes=10**9, build_seconds=1)
    return CaseRecord(
        name=f"sd-1.5/b1/{backend}/{program}",
        model="sd-1.5",
        batch=1,
        dtype="fp16",
        backend=backend,
        program=program,
        baseline=f"{backend}/full",
        ours=program in OURS,
        status="measured",
        macs=int(1e12 * ratio),
        macs_ratio=ratio,
        parity=Parity(error=0, rounding=0, tolerance=1e-4, passed=True),
        rounds=10,
        candidate_figures=figures,
        baseline_figures=figures,
        speedup=Spread(median=speedup, p5=speedup - 0.1, p95=speedup + 0.1),
        efficiency=speedup * ratio,
    )


def test_the_first_lines_say_what_holds_and_where_ours_loses():
    rows = [
        made("cuda-graph", "published", 4.7, 0.2),
        made("eager", "published", 4.4, 0.2),
        made("cuda-graph", "fewer-steps", 4.9, 0.2),
        made("eager", "deepcache-5", 9.0, 0.3),  # more MACs: no loss at equal compute
        made("eager", "mixed", 0.9, 0.35),
    ]
    lines = headlines(rows, [], tiny=False)
    assert "cuda-graph: 4.70 times" in lines[0]
    assert lines[0].endswith("at least 4.6 holds.")
    assert lines[1].endswith("at least 4.6 does not hold.")
    losses = [line for line in lines if line.startswith("Loses")]
    assert any("cuda-graph/published 4.70 against fewer-steps 4.90" in line for line in losses)
    assert any("eager/mixed has 0.90 times" in line for line in losses)
    assert not any("eager/published" in line for line in losses)
    assert any("eager/mixed 0.90 against deepcache-5 9.00" in line for line in losses)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give -o DIR for a new folder"),
        (["--resume", "{}", "--tiny"], "no report.json in it to go on from"),
        (["-o", "{}", "--tiny", "--only", "nonsense"], "'nonsense' matches no case"),
        (["-o", "{}", "--tiny", "--repeats", "2"], "at least 3 --repeats"),
    ],
)
def test_bad_input_is_one_line(arguments, said, tmp_path, capsys):
    assert main([each.format(tmp_path) for each in arguments]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_true_sizes_need_a_device(tmp_path, capsys):
    assert main(["-o", str(tmp_path / "r")]) == 2
    assert "no CUDA device here" in capsys.readouterr().err


def test_a_report_is_not_written_over(tmp_path, capsys):
    report = GpuReport(tiny=False, headline=[], calls=[], cases=[made("eager", "published", 4.4, 0.2)])
    (tmp_path / "report.json").write_text(report.text())
    assert main(["-o", str(tmp_path), "--tiny"]) == 2
    assert "--resume" in capsys.readouterr().err
    assert main(["--resume", str(tmp_path), "--tiny"]) == 1
    assert "measured without --tiny" in capsys.readouterr().err
    assert read_gpu_report(tmp_path / "report.json") == report


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_one_cuda_graph_is_the_loop(tmp_path):
    """On a device: the whole trajectory captured gives the same latents as the loop, for other inputs too."""
    from benchmarks.gpu.bundles import Bundles
    from benchmarks.gpu.ground import prepare_ground

    load = next(each for each in workloads(True, True) if each.model == "dit-xl-2")
    ground = prepare_ground(load, torch.device("cuda"), True, tmp_path)
    programs = Programs(ground, Bundles(ground, tmp_path))
    for program in ("mixed", "whole-steps"):
        expected, found = programs.get("eager", program), programs.get("cuda-graph", program)
        assert np.array_equal(found.latent(), expected.latent())
        ground.noise.normal_(generator=torch.Generator("cuda").manual_seed(1))
        assert np.array_equal(found.latent(), expected.latent())


def test_a_captured_loop_keeps_the_tensors_that_its_graph_reads(monkeypatch):
    """A graph knows addresses alone: the loop's timesteps must not be freed while it can be replayed."""
    for name in ("Stream", "current_stream", "synchronize", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, MagicMock)
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda _: nullcontext())

    class Doubling:
        def __call__(self, noise, conditions):
            return 2 * noise

    loop = Doubling()
    known = weakref.ref(loop)
    replay = captured(loop, torch.ones(1), {})
    del loop
    gc.collect()
    assert known() is not None
    assert replay(torch.ones(1), {}).item() == 2
    del replay
    gc.collect()
    assert known() is None


def test_workloads_are_known_models():
    for load in WORKLOADS:
        assert find_model(load.model, random_weights=True).config
        assert load.main in OURS
