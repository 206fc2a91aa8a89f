import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checks import python

LINUX = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's high-water mark")


@LINUX
def test_what_is_freed_before_the_end_counts():
    program = "import torch; from benchmarks.studies.search_memory import _peak_above as peak; torch.ones(9).sum(); "
    program += "print(peak(lambda: torch.ones(256, 2**18).sum()))"
    assert 240 < int(python(program).stdout) / 2**20 < 320


@pytest.mark.slow
@LINUX
def test_memory_is_measured_beside_its_estimate(tiny_dit, tmp_path):
    output = tmp_path / "found.json"
    command = [sys.executable, "-m", "benchmarks.studies.search_memory", tiny_dit, "--latent", "32", "--steps", "3"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    subprocess.run([*command, "-o", output], env=environment, check=True, capture_output=True)
    record = json.loads(output.read_text())
    runs = record["measured"]["runs"]
    assert all(run["peak"] > 0 for run in runs)
    estimates = {(run["what"], run["recompute"]): run["estimate"] for run in runs}
    kinds = ("SuperNet", "learned backups")
    assert list(estimates) == [(what, recompute) for recompute in (True, False) for what in kinds]
    assert all(estimates[what, True] < estimates[what, False] for what in kinds)
    full = record["full_size"]["estimates"]
    assert full["half precision"]["total"] < full["float32"]["total"]
