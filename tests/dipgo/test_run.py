"""The run folder: what a resume accepts, what it refuses in one line, and what is logged."""

import json
import pickle
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save

from dipgo.searching.checkpoint import pack, read_checkpoint
from dipgo.searching.run_folder import Cadence, Run, open_run
from tests.checks import misused, refused

SETTINGS = {"model": {"name": "m", "weights_sha256": "ab"}, "budget": 0.5, "settings": {"alpha": 1.0, "steps": ()}}


def ground(width=3):
    torch.manual_seed(0)
    module = torch.nn.Linear(width, 2)
    optimiser = torch.optim.Adam(module.parameters(), lr=0.1)
    module(torch.ones(1, width)).sum().backward()
    optimiser.step()
    return module, optimiser, torch.amp.GradScaler("cpu", enabled=False)


def begun(folder, iteration=3):
    run = open_run(folder, SETTINGS)
    run.phase("gates").keep(iteration, *ground())
    return run


def resumed(folder, settings=SETTINGS):
    return open_run(folder, settings, resume=True)


def test_a_checkpoint_holds_everything_and_no_pickle(tmp_path):
    begun(tmp_path / "run")
    path = tmp_path / "run" / "gates.safetensors"
    record, tensors = read_checkpoint(path)
    module, optimiser, scaler = ground()
    draws = torch.rand(2)
    module.weight.data.zero_()
    optimiser.state.clear()
    assert resumed(tmp_path / "run").phase("gates").restore(module, optimiser, scaler) == 3
    again = pack(module, optimiser)
    assert record.iteration == 3
    assert {"module.weight", "optimiser.0.exp_avg_sq", "optimiser.1.step", "rng.cpu"} <= tensors.keys()
    assert tensors.keys() == again.keys()
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)
    assert torch.equal(torch.rand(2), draws), "the random numbers go on where they were"
    for entry in (tmp_path / "run").iterdir():
        with pytest.raises((pickle.UnpicklingError, ValueError, KeyError, EOFError)), entry.open("rb") as stream:
            pickle.load(stream)


def test_other_settings_and_checkpoints_of_others_are_refused(tmp_path):
    begun(tmp_path / "a")
    for change, message in (
        ({"model": {"name": "m", "weights_sha256": "cd"}}, 'model.weights_sha256 = "ab", now it is "cd"'),
        ({"budget": 0.4}, "budget = 0.5, now it is 0.4"),
        ({"settings": {"alpha": 2.0, "steps": ()}}, "settings.alpha = 1.0, now it is 2.0"),
    ):
        with refused(f"was begun with {message}"):
            resumed(tmp_path / "a", SETTINGS | change)
    whole = (tmp_path / "a" / "gates.safetensors").read_bytes()
    other, same = open_run(tmp_path / "b", SETTINGS | {"budget": 0.4}), resumed(tmp_path / "a")
    (tmp_path / "b" / "gates.safetensors").write_bytes(whole)
    with refused("of another model or of other settings"):
        other.phase("gates").restore(*ground())
    with refused(r"'weight' is \[2, 3\], this search needs \[2, 4\]"):
        same.phase("gates").restore(*ground(4))
    (tmp_path / "a" / "backups.safetensors").write_bytes(whole)
    with refused("a checkpoint of phase 'gates'"):
        same.phase("backups").restore(*ground())


def test_damaged_and_foreign_files_are_refused(tmp_path):
    begun(tmp_path / "run")
    path = tmp_path / "run" / "gates.safetensors"
    whole = path.read_bytes()
    (tmp_path / "run" / ".gates.dipgo-abcdefgh.safetensors").write_bytes(b"half")  # a draft that a kill left
    run = resumed(tmp_path / "run")
    files = {"clock.json", "gates.safetensors", "lock", "run.json"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == files
    for content in (whole[:-10], whole[:100], b"", pickle.dumps({"a": 1}), save({"weight": torch.zeros(2)})):
        path.write_bytes(content)
        with refused(r"not a readable checkpoint .*; remove it to begin its phase anew"):
            run.phase("gates").restore(*ground())


def test_folders_that_exist(tmp_path):
    begun(tmp_path / "run")
    with misused("--resume goes on with it"):
        open_run(tmp_path / "run", SETTINGS)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("years of work")
    with refused("holds files but no run"):
        resumed(tmp_path / "other")
    assert (tmp_path / "other" / "thesis.tex").read_text() == "years of work"
    with misused("is a file"):
        resumed(tmp_path / "other" / "thesis.tex")
    fresh = resumed(tmp_path / "fresh")
    assert fresh.phase("gates").restore(*ground()) == 0, "a kill before the first file is no reason to refuse"
    (tmp_path / "run" / "run.json").write_text('{"schema": "dipgo.run/0"}')
    with refused("not a run that this version reads"):
        resumed(tmp_path / "run")


def test_what_is_due_and_what_is_made_once(tmp_path):
    calls = []

    def make():
        calls.append(1)
        return {"psnr": np.array([1.5, 2.5]), "gates": np.eye(3, dtype=bool)}

    for resume in (False, True, True):
        arrays = open_run(tmp_path / "run", SETTINGS, resume).once("policies", make)
        assert arrays["psnr"].tolist() == [1.5, 2.5]
        assert arrays["gates"].dtype == bool
    assert len(calls) == 1
    Run().once("policies", make)
    assert len(calls) == 2, "without a folder nothing is kept"
    counted = replace(Run(), cadence=Cadence(iterations=4, seconds=0)).phase("p")
    assert [k for k in range(1, 13) if counted.due(k)] == [4, 8, 12]
    timed = replace(Run(), cadence=Cadence(iterations=0, seconds=60)).phase("p")
    assert not timed.due(1)
    timed._last -= 61
    assert timed.due(2)


def test_seconds_add_up_over_the_processes_that_worked(tmp_path, monkeypatch):
    """What was done after the last checkpoint is done again, and counts once."""
    now = [100.0]
    monkeypatch.setattr("dipgo.searching.journal.time.monotonic", lambda: now[0])
    run = open_run(tmp_path / "run", SETTINGS)
    run.clock.start("0.5")
    now[0] += 7
    run.clock.start("0.35")
    now[0] += 10
    run.phase("gates").keep(3, *ground())
    now[0] += 5
    assert run.clock.seconds() == 15
    now[0] = 3.0  # another process has another clock
    again = resumed(tmp_path / "run")
    again.clock.start("0.35")
    now[0] += 2
    again.once("policies", lambda: {"psnr": np.zeros(1)})
    assert again.clock.seconds() == 12
    now[0] = 0.0
    third = resumed(tmp_path / "run").clock
    assert [(third.start(part), third.seconds())[1] for part in ("0.5", "0.35", "0.25")] == [7, 12, 0]
    for content in ("[1]", '{"0.5": "long"}', "{"):
        (tmp_path / "run" / "clock.json").write_text(content)
        with refused(r"clock\.json: not a "):
            resumed(tmp_path / "run")


def test_two_processes_do_not_share_a_folder(tmp_path):
    """A kill frees it; the process that has it may open it again."""
    begin = "import sys; from pathlib import Path; from dipgo.searching.run_folder import open_run; "
    begin += f"run = open_run(Path(sys.argv[1]), {SETTINGS}); print('begun', flush=True); input()"
    command = [sys.executable, "-c", begin, tmp_path / "run"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"begun\n"
        with refused(r"run: another process works in it; wait for it, or give another"):
            resumed(tmp_path / "run")
        other.kill()
    runs = [resumed(tmp_path / "run") for _ in range(2)]
    assert all(run.lock for run in runs)


def test_tensorboard_reads_what_was_logged(tmp_path):
    """Also after a resume: what came after the checkpoint is hidden, not shown twice."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    begun(tmp_path / "run", iteration=2)
    for last, loss in ((4, 1.0), (6, 0.5)):
        run = open_run(tmp_path / "run", SETTINGS, resume=True, tensorboard=True)
        phase = run.phase("gates")
        for iteration in range(phase.restore(*ground()) + 1, last + 1):
            phase.tell(iteration, 6, {"loss": loss, "kept": 0.5})
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard" / "gates")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(k, 0.5) for k in (3, 4, 5, 6)]
    lines = [json.loads(line) for line in (tmp_path / "run" / "journal.jsonl").read_text().splitlines()]
    assert lines == [{"phase": "gates", "iteration": k, "loss": 0.5, "kept": 0.5} for k in (3, 4, 5, 6)]


def test_a_missing_tensorboard_is_one_line(tmp_path, monkeypatch):
    for name in ("tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    with refused(r"pip install 'dipgo\[logs\]'"):
        open_run(tmp_path / "run", SETTINGS, tensorboard=True)
    assert not (tmp_path / "run").exists()
