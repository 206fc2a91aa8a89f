import onnx

from benchmarks.studies import binding_times
from export.bundle import open_bundle


def test_both_programs_agree_and_one_has_all_inside_its_loop(tiny_dit, tmp_path):
    found = binding_times.measure(tiny_dit, 3, 2, tmp_path)
    assert found["steps"] == 3
    assert 0 <= found["relative_error"] < binding_times.TOLERANCE
    timings = found["timings"]
    assert {name: len(timing.samples) for name, timing in timings.items()} == {"inside": 2, "hoisted": 2}
    assert timings["inside"].ratios == [1, 1], "it is what the other is paired with"
    nodes, prologues = {}, {}
    for name in timings:
        record = open_bundle(tmp_path / name).record
        (graph,) = record.graphs.values()
        nodes[name] = len(onnx.load(tmp_path / name / graph.file, load_external_data=False).graph.node)
        prologues[name] = len(record.prologues)
    assert nodes["hoisted"] < nodes["inside"]
    assert prologues["inside"] == 0 < prologues["hoisted"]
