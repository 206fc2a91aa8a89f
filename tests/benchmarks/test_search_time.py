from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import search_time
from dipgo.errors import DipgoError
from dipgo.search.settings import PRESETS


def test_a_search_is_timed_in_a_process_of_its_own(tiny_dit: str, tmp_path: Path):
    output = tmp_path / "found.json"
    search_time.main([tiny_dit, "--steps", "3", "--budgets", "0.6", "--preset", "quick", "-o", str(output)])
    record = search_time.SearchTimes.model_validate_json(output.read_text())
    (found,) = record.searches
    assert found.budget == 0.6
    assert found.iterations >= PRESETS["quick"].backup_iterations
    assert found.seconds > 0
    assert found.peak_bytes > 50_000_000, "torch alone takes more"
    assert found.held_out_psnr_db > 0


def test_a_search_that_fails_is_said_and_nothing_is_written(tiny_dit: str, tmp_path: Path):
    output = tmp_path / "found.json"
    with pytest.raises(DipgoError, match=r"the search at 0\.01 failed: dipgo: "):
        search_time.main([tiny_dit, "--steps", "3", "--budgets", "0.01", "-o", str(output)])
    assert not output.exists()
