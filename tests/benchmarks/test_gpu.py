"""`make gpu`, rehearsed: its steps in real processes on small models, what fails beside what does not."""

import json
import warnings
from importlib.resources import files

import jsonschema
import pytest

from benchmarks import gpu
from benchmarks.bench.suite import Workload, load_suite, suites
from benchmarks.bench.workload import COMPILED, EAGER, FEWER, LEARNED, MAIN, compile_programs, measure_programs
from benchmarks.gpu_steps import steps
from benchmarks.pages.render import markdown
from dipgo.base.errors import DipgoWarning
from engines.program import Program
from tests import zoo
from tests.checks import refused

PROGRAMS = ["full", MAIN, FEWER, LEARNED]


def records(folder):
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("gpu-*.json")}


def test_steps_are_in_order_of_worth_and_a_suite_is_all_that_a_family_needs():
    names = [step.name for step in steps()]
    assert len(set(names)) == len(names)
    assert names[:4] == ["sd15-torch", "sd15-onnxruntime-cuda", "sdxl-torch", "dit-xl-torch"]
    assert names[4:8] == ["search-block", "search-layer", "sd15-torch-compile", "sd15-tensorrt"]
    measured = {(step.suite, step.backend) for step in steps() if step.backend}
    on_gpu = {name: load_suite(name) for name in suites() if name.startswith("gpu-")}
    assert measured == {(name, backend) for name, suite in on_gpu.items() for backend in suite.backends}


def test_a_step_is_written_resumed_and_does_not_mind_one_that_takes_too_long(tmp_path, capsys):
    """The first of two steps has half a second; the other is rehearsed whole, and not again the second time."""
    folder, bundles = tmp_path / "gpu", tmp_path / "bundles"
    (late,) = gpu.run(folder, bundles, True, 600, 0.5, ["pixart-torch"])
    assert late.status == "failed"
    assert late.error.startswith("no answer within")
    (done,) = gpu.run(folder, bundles, True, 600, 600, ["dit-xl-torch"])
    assert (done.status, done.error) == ("measured", None)
    assert [row.program for row in done.rows] == [EAGER, *PROGRAMS]
    assert [row.error for row in done.rows] == [None] * 5
    for row in done.rows[1:]:
        assert row.parity.passed
        assert row.timing.wall.median > 0
    ratios = {row.program: row.macs_ratio for row in done.rows}
    plain = round(10 * ratios[MAIN])
    assert [row.steps for row in done.rows] == [None, 10, 10, plain, 10]
    assert (ratios["full"], ratios[FEWER]) == (1, plain / 10)
    assert 0 < ratios[MAIN] < 0.5
    again = gpu.run(folder, bundles, True, 600, 0.5, ["dit-xl-torch", "pixart-torch"])
    assert [record.status for record in again] == ["measured", "failed"]
    assert "dit-xl-torch: measured already" in capsys.readouterr().out
    with refused(r"gpu-dit-xl-torch.json: rehearsed; give another folder"):
        gpu.run(folder, bundles, False, 600, 600, ["dit-xl-torch"])
    assert records(folder).keys() == {"gpu-dit-xl-torch", "gpu-pixart-torch"}
    schema = json.loads(gpu.json_schema())
    for record in records(folder).values():
        jsonschema.validate(record, schema)
    table = markdown(folder / "gpu-dit-xl-torch.json", "x.json")
    assert all(f"| {name} | torch | {ratios[name]:.1%} | " in table for name in PROGRAMS)
    assert "Failed: no answer within" in markdown(folder / "gpu-pixart-torch.json", "x.json")


def test_the_schema_is_published():
    published = files("benchmarks").joinpath("schemas/gpu-2.json").read_text()
    assert published == gpu.json_schema(), "write benchmarks.gpu.json_schema() to that file"


@pytest.fixture(scope="module")
def workload():
    return Workload(model=zoo.pipeline("dit"), steps=5, dtype="fp32", sampler="ddim", share=0.4)


@pytest.fixture(scope="module")
def programs(workload, tmp_path_factory):
    return compile_programs(workload, tmp_path_factory.mktemp("gpu") / "programs")


def test_programs_are_compiled_once(workload, programs):
    assert list(programs) == PROGRAMS
    times = {path: (path / "bundle.json").stat().st_mtime_ns for path in programs.values()}
    assert compile_programs(workload, programs["full"].parent) == programs
    assert {path: (path / "bundle.json").stat().st_mtime_ns for path in programs.values()} == times


def test_one_that_is_wrong_is_not_timed_and_one_that_fails_leaves_the_others(workload, programs, tmp_path, monkeypatch):
    denoise = Program.denoise

    def faulty(program, *arguments, **options):
        name = next(name for name, folder in programs.items() if folder == program.bundle.folder)
        if name == FEWER:
            raise RuntimeError("CUDA error: an illegal\nmemory access")
        if name == LEARNED:
            warnings.warn("no CUDA graph", DipgoWarning, stacklevel=2)
        return denoise(program, *arguments, **options) * (1.001 if name == MAIN else 1)

    monkeypatch.setattr(Program, "denoise", faulty)
    rows = {row.program: row for row in measure_programs(workload, programs, "onnxruntime", 3, tmp_path)}
    assert rows[MAIN].error.startswith("parity failed, relative error")
    assert rows[MAIN].timing is None
    assert rows[FEWER].error == "RuntimeError: CUDA error: an illegal memory access"
    assert rows[LEARNED].error is rows["full"].error is None
    assert set(rows[LEARNED].warnings) == {"no CUDA graph"}
    assert len(rows["full"].timing.samples) == len(rows["full"].timing.ratios) == 3
    assert rows["full"].launches == 5
    assert rows[EAGER].timing.ratios == [1, 1, 1]
    assert rows["full"].parity.line() in rows["full"].line()
    assert "parity failed" in rows[MAIN].line()


@pytest.mark.slow
def test_torch_compile_is_held_against_the_eager_model(workload, programs, tmp_path):
    rows = list(measure_programs(workload, {"full": programs["full"]}, "torch-compile", 1, tmp_path))
    assert [row.program for row in rows] == [EAGER, "full", COMPILED]
    assert rows[2].error is None
    assert rows[2].agreement <= 1e-3


@pytest.mark.slow
def test_all_of_it_is_rehearsed(tmp_path):
    made = gpu.run(tmp_path, tmp_path / "bundles", True, 3600, 900)
    assert [record.step for record in made] == [step.name for step in steps()]
    for record in made:
        assert record.status == "measured", record.error
        assert [row.error for row in (*record.rows, *record.searches)] == [None] * len((*record.rows, *record.searches))
