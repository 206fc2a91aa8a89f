"""A few mutants of each kind: ``make fuzz`` tries thousands."""

import pytest

from tests.fuzz.kinds import make_kinds
from tests.fuzz.worker import Worker

KINDS = ("bundle", "subnet", "schedule", "pickle", "safetensors", "recipe")


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    with Worker(make_kinds(folder / "seeds"), folder / "scratch") as worker:
        yield worker


@pytest.mark.parametrize("kind", KINDS)
def test_mutants_are_refused_in_one_line_or_run(worker, kind):
    verdicts = {seed: worker.judge(kind, seed) for seed in range(15)}
    assert {seed: verdict.faults for seed, verdict in verdicts.items() if verdict.faults} == {}
    assert any(verdict.outcome != "ran" for verdict in verdicts.values())


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_changed_runs(worker, kind):
    assert worker.judge(kind, None).outcome == "ran"
