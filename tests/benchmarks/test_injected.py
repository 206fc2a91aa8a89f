"""A slowed program, a wrong one and one that crashes, all in one benchmark: each is caught, and the report shows it."""

import json
import os
import shutil
import signal
import tempfile

import onnx
import psutil
import pytest
from onnx import TensorProto, helper

from benchmarks.bench.baselines import fewer_steps, full, uniform_reuse
from benchmarks.bench.bench import bench
from benchmarks.bench.config import BenchConfig
from benchmarks.bench.suite import Suite
from tests.benchmarks.test_parity import change_a_table, reseal, scale

SIDE = 512  # a product of two matrices of this size takes longer than a whole step of the tiny model


def slow_down(folder):
    """Add zero times a large product of matrices to the first output of every graph of the loop."""
    for graph in json.loads((folder / "bundle.json").read_text())["graphs"].values():
        model = onnx.load(str(folder / graph["file"]), load_external_data=False)
        output = model.graph.output[0].name
        producer = next(node for node in model.graph.node if output in node.output)
        producer.output[list(producer.output).index(output)] = "quick"
        for node in model.graph.node:
            for place, name in enumerate(node.input):
                if name == output:
                    node.input[place] = "quick"
        zero = helper.make_tensor("slow.zero", TensorProto.FLOAT, [], [0.0])
        model.graph.initializer.extend([zero, helper.make_tensor("slow.shape", TensorProto.INT64, [2], [SIDE, SIDE])])
        for name, inputs, result, options in (
            ("ReduceMean", ["quick"], "slow.mean", {"keepdims": 0}),
            ("Mul", ["slow.mean", "slow.zero"], "slow.scaled", {}),
            ("Expand", ["slow.scaled", "slow.shape"], "slow.matrix", {}),
            ("MatMul", ["slow.matrix", "slow.matrix"], "slow.product", {}),
            ("ReduceSum", ["slow.product"], "slow.sum", {"keepdims": 0}),
            ("Add", ["quick", "slow.sum"], output, {}),
        ):
            model.graph.node.append(helper.make_node(name, inputs, [result], **options))
        (folder / graph["file"]).write_bytes(model.SerializeToString())
        reseal(folder, graph["file"])


@pytest.fixture(scope="module")
def report(bundle, tmp_path_factory):
    scratch = tmp_path_factory.mktemp("injected")
    shutil.copytree(bundle, slowed := scratch / "slowed")
    slow_down(slowed)
    done: set[str] = set()

    def inject(phase, count, total, figure):
        if phase == "compile and verify" and figure == "verify wrong" and "wrong" not in done:
            done.add("wrong")
            (folder,) = scratch.glob("dipgo-bench-*/1")
            change_a_table(folder, "solver.outputs", lambda table: scale(table, 0, 1.01))
        if phase == "measure" and figure == "time the loop" and "crash" not in done:
            done.add("crash")
            workers = [
                child for child in psutil.Process().children() if "benchmarks.bench.worker" in " ".join(child.cmdline())
            ]
            last = max(workers, key=lambda child: child.create_time())
            os.kill(last.pid, signal.SIGKILL)

    suite = Suite(about="small", images=0, repeats=6, seconds=0, threads=1, scopes=["loop"], patience=60)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(scratch))
        baselines = {"full": full, "wrong": uniform_reuse, "crashes": fewer_steps}
        made = bench(slowed, scratch / "report", BenchConfig(suite=suite), progress=inject, baselines=baselines)
    assert done == {"wrong", "crash"}
    page = (scratch / "report" / "report.html").read_text()
    summary = (scratch / "report" / "report.md").read_text()
    for row in made.rows:
        if row.error:
            assert f"not measured: {row.error}" in page
            assert f"not measured: {row.error}" in summary
    return made


def test_a_slowed_program_is_shown_as_slow_and_a_wrong_or_dead_one_gets_no_speed(report):
    row = report.row("dipgo")
    assert row.timing.speedup.p95 < 1
    assert row.efficiency < 0.5
    losses = [entry.line for entry in report.headline if entry.kind == "loss"]
    assert any(line.startswith("Slower than the full program") for line in losses)
    assert any(line.startswith("Efficiency 0.") for line in losses)
    wrong, dead = report.row("wrong"), report.row("crashes")
    assert wrong.error.startswith("parity failed, relative error ")
    assert wrong.timing is wrong.quality is wrong.usage is dead.timing is None
    assert dead.error == "its process was killed by SIGKILL"
    assert report.rounds == 6
    assert report.row("full").timing is not None, "the others go on"
