import pytest

from benchmarks.studies import search_time
from dipgo.base.errors import DipgoError
from dipgo.searching.config import PRESETS


@pytest.mark.slow
@pytest.mark.parametrize("budgets", ["0.6", "0.4,0.6"])
def test_a_sweep_is_timed_in_a_process_of_its_own(tiny_dit, tmp_path, budgets):
    output = tmp_path / "found.json"
    command = [tiny_dit, "--steps", "3", "--sampler", "dpm++2m", "--budgets", budgets, "--preset", "quick"]
    search_time.main([*command, "-o", str(output)])
    record = search_time.SearchTimes.model_validate_json(output.read_text())
    assert record.sampler == "DPMSolverMultistepScheduler"
    assert [found.budget for found in record.searches] == sorted(map(float, budgets.split(",")), reverse=True)
    for found in record.searches:
        assert found.iterations >= round(PRESETS["quick"]["backup_iterations"] / found.budget)
        assert 0 < found.gradient_seconds < found.seconds
        assert found.peak_bytes > 50_000_000, "torch alone takes more"
        assert found.held_out_psnr_db > 0
    assert sum(found.seconds for found in record.searches) < record.seconds


def test_a_search_that_fails_is_said_and_nothing_is_written(tmp_path):
    output = tmp_path / "found.json"
    with pytest.raises(DipgoError, match=r"the search failed: dipgo: no model 'nowhere'"):
        search_time.main(["nowhere", "-o", str(output)])
    assert not output.exists()
