"""How much a search computes, held against what a search does compute."""

import itertools

import pytest
import torch

from benchmarks.studies.search_pace import main as search_pace
from dipgo.eager.trajectory import Trajectory
from dipgo.schedule.fixed_schedules import fixed_schedules
from dipgo.searching.config import PRESETS
from dipgo.searching.effort import Effort, effort_of
from dipgo.searching.forecast import Forecast, forecast
from dipgo.searching.search import search
from dipgo.searching.task import make_task
from tests import zoo
from tests.checks import misused
from tests.zoo import search_config


@pytest.mark.parametrize(("contenders", "drops"), [(2, 3), (4, 4)])
def test_it_is_what_a_search_computes(monkeypatch, contenders, drops):
    """Iterations to the one; images that are judged within a third, since candidates are often the same gates."""
    task, gated = zoo.task("dit", 6), []
    run = Trajectory.gated

    def counted(self, noise, *rest):
        if not torch.is_grad_enabled():
            gated.append(len(noise))
        return run(self, noise, *rest)

    monkeypatch.setattr(Trajectory, "gated", counted)
    config, learned = search_config(6, 0.5, contenders=contenders, drops=drops, backup_iterations=9), {}

    def report(phase, iteration, total, figure):
        if phase.startswith(("trial", "backups")):
            learned[phase] = iteration

    search(task, config, report)
    fixed = fixed_schedules(task.trace.macs, 6, 0.5)
    effort = effort_of(config, 0.5, len(fixed) + 2)
    assert sum(learned.values()) == effort.iterations
    assert sum(gated) == pytest.approx(effort.gated, rel=1 / 3)


def test_a_forecast_counts_what_a_search_computes(monkeypatch):
    """With a clock that ticks once a look, the timed call takes one second for the batch."""
    monkeypatch.setattr("time.perf_counter", itertools.count().__next__)
    task, config = zoo.task("dit", 6), search_config(6, 0.5, backup_iterations=9)
    seen = forecast(task, config)
    assert seen.image == 6 / config.batch
    fixed = len(fixed_schedules(task.trace.macs, 6, 0.5)) + 2
    learning = config.batch * seen.image * 0.5 * 3
    assert seen.search == pytest.approx(effort_of(config, 0.5, fixed).seconds(learning, seen.image, seen.image / 2))
    assert Forecast(1, 60).line() == "takes about 60 s"
    assert Forecast(1, 60).line(120) == "takes about 3 min: 60 s to search, 2 min to export and measure"
    paper = forecast(task, config.changed(method="paper", gate_iterations=7))
    assert paper.search == 7 * 1 * 3 * 6


def test_seconds_are_put_together():
    assert Effort(iterations=10, full=20, gated=30).seconds(1, 0.1, 0.01) == pytest.approx(12.3)
    assert effort_of(search_config(6, 0.5, backup_iterations=0), 0.5, 3).iterations == 0


@pytest.mark.slow
def test_the_pace_of_a_search_is_measured_setting_by_setting(tmp_path, capsys):
    words = [zoo.pipeline("sd"), "--steps", "4", "--budget", "0.6", "--precision", "fp32,bf16", "--batch", "1"]
    search_pace([*words, "-o", str(tmp_path / "pace.json")])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    for line, precision in zip(lines, ("fp32", "bf16"), strict=True):
        assert line.startswith(f"search by block, {precision}, batch 1: ")
        assert "iterations per minute" in line
    assert '"error": null' in (tmp_path / "pace.json").read_text()


def test_auto_is_the_gpu_where_there_is_one(monkeypatch):
    assert make_task(zoo.model("dit"), 4, "ddim", zoo.trace("dit"), 4.0, device="auto").trajectory.device.type == (
        "cuda" if torch.cuda.is_available() else "cpu"
    )
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        with misused("device 'cuda' cannot be used here"):
            make_task(zoo.model("dit"), 4, "ddim", zoo.trace("dit"), 4.0, device="auto")
    config = search_config(6, 0.5, preset="gpu")
    assert (config.device, config.recompute) == ("auto", True)
    assert config.batch == 2  # what is given goes before the preset
    assert PRESETS["gpu"].keys() <= type(config).model_fields.keys()
