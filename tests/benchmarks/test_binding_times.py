from __future__ import annotations

import sys
from pathlib import Path

import onnx
import pytest

from benchmarks import binding_times
from export.bundle import open_bundle


def test_both_programs_agree_and_one_has_all_inside_its_loop(
    tiny_dit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    output = tmp_path / "found.json"
    command = ["binding_times", tiny_dit, "--steps", "3", "--repeats", "2", "-o", str(output)]
    monkeypatch.setattr(sys, "argv", command)
    binding_times.main()
    found = binding_times.BindingTimes.model_validate_json(output.read_text())
    assert found.steps == 3
    assert 0 <= found.relative_error < binding_times.TOLERANCE
    assert {name: len(timing.samples) for name, timing in found.timings.items()} == {"inside": 2, "hoisted": 2}
    assert found.timings["inside"].ratios == [1, 1], "it is what the other is paired with"
    nodes, prologues = {}, {}
    for name, folder in binding_times.compile_both(tiny_dit, 3, tmp_path).items():
        record = open_bundle(folder).record
        (graph,) = record.graphs.values()
        nodes[name] = len(onnx.load(folder / graph.file, load_external_data=False).graph.node)
        prologues[name] = len(record.prologues)
    assert nodes["hoisted"] < nodes["inside"]
    assert prologues["inside"] == 0 < prologues["hoisted"]
