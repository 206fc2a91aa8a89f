"""What a process holds, also where the system says less about it."""

import psutil
import pytest

from dipgo.base import process_memory
from tests.checks import python

HOLDER = """
from pathlib import Path
from dipgo.base import process_memory
process_memory._STATUS = Path(sys.argv[1])
before = process_memory.resident_peak()
held = bytearray(b"x") * 200_000_000
print(before, process_memory.resident_peak(), process_memory.resident())
"""


@pytest.mark.parametrize("status", ["own", "none", "without the peak"])
def test_the_peak_is_what_was_held(tmp_path, status):
    """Some sandboxes have a status file without the peak; other systems have none."""
    path = tmp_path / "status" if status != "own" else process_memory._STATUS
    if status == "without the peak":
        path.write_text("Name:\tpython\nVmRSS:\t 12 kB\n")
    before, after, resident = map(int, python(HOLDER, path).stdout.split())
    if status == "own":
        assert 190_000_000 < after - before < 210_000_000
    assert 200_000_000 < resident <= after * 1.01
    assert after < psutil.virtual_memory().total, "in bytes; where the system says less, it may be a parent's"
