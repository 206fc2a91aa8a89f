import json

import pytest

from benchmarks.studies import session_memory
from export.bundle import open_bundle


@pytest.mark.slow
def test_each_way_is_measured_in_a_process_of_its_own(bundle, tmp_path):
    output = tmp_path / "found.json"
    session_memory.main([str(bundle), "--sessions", "2", "-o", str(output)])
    record = json.loads(output.read_text())
    assert record["model"] == open_bundle(bundle).record.model.name
    ways = [(row["way"], row["sessions"]) for row in record["rows"]]
    assert ways == [("shared", 1), ("shared", 2), ("prepacked", 1)]
    for row in record["rows"]:
        assert row["pss"]["before"] < min(row["pss"]["loaded"], row["pss"]["after"])
        assert row["load_seconds"] > 0
        assert len(row["run_seconds"]) == row["sessions"]
        assert min(row["run_seconds"]) > 0
