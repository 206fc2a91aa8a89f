"""Where the SubNets of a search go, and what a resumed one finds there."""

import json
from contextlib import nullcontext

import numpy as np
import pytest

from dipgo.api import search_into
from dipgo.base.progress import silent
from dipgo.schedule.subnet import load_subnet, weights_file
from dipgo.searching.config import SearchConfig
from tests import zoo
from tests.checks import misused, refused
from tests.dipgo.test_latency import made_up

QUICK = zoo.LEAST | {"drops": 0, "contenders": 1, "trial_iterations": 0}


class Stopped(Exception):
    pass


class Shown:
    """Progress that goes to a report alone."""

    def __init__(self, report):
        self.report = report

    def spinner(self, label):
        return nullcontext()

    def phases(self):
        return nullcontext(self.report)


def ask(model, output, budget="0.6", report=silent, force=False, **more):
    config = SearchConfig(**{"steps": 6, "budget": budget, **QUICK, **more})
    return search_into(output, model, config, force, Shown(report))


def stopping(phase):
    """A report that stops the search where ``phase`` begins."""

    def report(name, *figures):
        if name == phase:
            raise Stopped

    return report


def begin(phase, *arguments, **more):
    """Ask for a search that stops where ``phase`` begins."""
    with pytest.raises(Stopped):
        ask(*arguments, report=stopping(phase), **more)


def test_a_sweep_that_stops_has_written_what_it_found_and_goes_on(tiny_dit, tmp_path):
    """It replaces nothing else: a run never begun has written nothing, another seed's SubNet is another search's."""
    folder, output = tmp_path / "run", tmp_path / "found"
    begin("fixed schedules 0.4", tiny_dit, output, "0.4,0.7", run_folder=folder)
    assert load_subnet(output / "0.7.json").search.budget == 0.7
    assert not (output / "0.4.json").exists()
    mine = (output / "0.7.json").read_bytes()
    other = tmp_path / "no-run"
    for options in ({}, {"report": stopping("fixed schedules 0.7"), "run_folder": other, "resume": True}):
        with misused(r"found exists; give another path, or --force"):
            ask(tiny_dit, output, "0.4,0.7", **options)
    (output / "0.4.json").write_bytes(mine)
    with misused(r"0\.4\.json: is of another search; give another path, or --force"):
        ask(tiny_dit, output, "0.4,0.7", stopping("fixed schedules 0.4"), run_folder=folder, resume=True)
    (output / "0.4.json").unlink()
    with misused(r"0\.7\.json: is of another search"):
        ask(tiny_dit, output, "0.4,0.7", run_folder=folder, resume=True, seed=1)
    assert (output / "0.7.json").read_bytes() == mine
    options = {"run_folder": folder, "resume": True, "checkpoint_seconds": 7}  # on the last no result depends
    written = ask(tiny_dit, output, "0.4,0.7", **options)
    assert [file.name for file, _ in written] == ["0.7.json", "0.4.json"]
    assert all(np.array_equal(load_subnet(file).gates, subnet.gates) for file, subnet in written)
    assert (output / "pareto.png").is_file()


def test_outputs_are_refused_before_the_search(tiny_dit, tmp_path):
    """Also where only the weights of a SubNet are left, or a folder lies where a file is to go."""
    output = tmp_path / "s.json"
    weights_file(output).write_bytes(b"mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    for where, budget, more, message in (
        (output, "0.6", {}, r"s\.safetensors exists; .*--force"),
        (tmp_path / "folder", "0.6", {"force": True}, "is a folder; give a JSON file"),
        (tmp_path / "file", "0.6,0.5", {"force": True}, "is a file; give a folder"),
        (tmp_path / "file", "0.6,0.5", {"resume": True, "run_folder": tmp_path / "run"}, "is a file; give a folder"),
    ):
        with misused(message):
            ask(tiny_dit, where, budget, stopping("fixed schedules 0.6"), **more)
    assert weights_file(output).read_bytes() == b"mine"
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.slow
def test_a_resumed_search_is_of_this_version_and_replaces_weights_that_a_kill_left(tiny_dit, tmp_path):
    """What another version judged and counted may be numbered otherwise here."""
    folder, output = tmp_path / "run", tmp_path / "s.json"
    begin("backups-0.6", tiny_dit, output, run_folder=folder)
    run = (folder / "run.json").read_text()
    record = json.loads(run)
    record["settings"]["dipgo"] = "0.0.9"
    (folder / "run.json").write_text(json.dumps(record))
    with refused(r'was begun with dipgo = "0\.0\.9", now it is .*; .*another --run-folder'):
        ask(tiny_dit, output, run_folder=folder, resume=True)
    assert not output.exists()
    (folder / "run.json").write_text(run)
    weights_file(output).write_bytes(b"left")  # without their JSON
    with misused(r"s\.safetensors exists"):
        ask(tiny_dit, output, run_folder=tmp_path / "no-run", resume=True)
    ask(tiny_dit, output, run_folder=folder, resume=True)
    assert load_subnet(output).schedule.learned
    with misused(r"s\.json exists"):
        ask(tiny_dit, output, run_folder=folder, resume=True)


def test_a_damaged_profile_of_a_run_is_one_line(tiny_dit, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text('{"schema": "dipgo.run/1", "settings": {"profile": {"schema": "other"}}}')
    with refused(r"run\.json: schema is 'other', this version reads"):
        ask(tiny_dit, tmp_path / "s.json", cost="latency", run_folder=folder, resume=True)


@pytest.mark.slow
def test_a_resumed_search_by_latency_keeps_its_profile(tiny_dit, tmp_path, monkeypatch):
    """Measured again the times would be others, and the run another."""
    measured = []

    def measure(task, threads):
        measured.append(made_up(task, [900 + len(measured)] * len(task.trace.sites)))
        return measured[-1]

    monkeypatch.setattr("benchmarks.latency.measure_latency", measure)
    options = {"cost": "latency", "run_folder": tmp_path / "run"}
    begin("backups-0.6", tiny_dit, tmp_path / "s.json", **options)
    ((file, subnet),) = ask(tiny_dit, tmp_path / "s.json", resume=True, **options)
    assert len(measured) == 1
    assert subnet.search.cost.profile == measured[0]
    again = ask(tiny_dit, tmp_path / "t.json", cost=str(file))
    assert again[0][1].search.cost == subnet.search.cost, "the profile of a SubNet serves another search"
