"""Data flows one way: the contracts of import-linter in ``pyproject.toml`` hold. And faults are of today's code."""

from pathlib import Path

from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

from tests.mutate import read_faults

ROOT = Path(__file__).parents[1]


def test_no_package_imports_upward(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    status = lint_imports(config_filename="pyproject.toml", no_cache=True)
    assert status == EXIT_STATUS_SUCCESS, capsys.readouterr().out


def test_the_faults_that_tests_are_tried_by_fit_the_code():
    assert len(read_faults()) >= 40
