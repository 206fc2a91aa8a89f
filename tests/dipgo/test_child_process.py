"""Child processes: what they import, what they answer, and that none is left behind."""

import os
import sys
import textwrap

import psutil
import pytest

from dipgo.base.child_process import ChildError, ChildProcess, python_environment
from tests.checks import refused

ECHO = """
    import os, subprocess, sys
    import dipgo
    from dipgo.base.child_process import Parent

    parent = Parent()
    for message in parent:
        print("working on", message)
        if message == "where":
            message = [dipgo.__file__, "numbers" in sys.modules and sys.modules["numbers"].__file__]
        elif message == "start":
            message = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid
        elif isinstance(message, int):
            os._exit(message)
        parent.send(message)
"""


@pytest.fixture
def echo(tmp_path, monkeypatch):
    """The name of a module, in a folder of PYTHONPATH, that sends back what it gets."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "echo_child.py").write_text(textwrap.dedent(ECHO))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    return "echo_child"


def test_messages_go_both_ways_and_prints_into_the_log(echo, tmp_path):
    with ChildProcess(echo, tmp_path / "log") as child:
        for message in ({"a": [1.5, None]}, "ü" * 100_000):
            child.send(message)
            assert child.receive(60) == message
        assert child.returncode is None
    assert child.returncode == 0
    assert "working on {'a': [1.5, None]}" in (tmp_path / "log").read_text()


def test_nothing_is_imported_from_the_working_directory(echo, tmp_path, monkeypatch):
    """Neither in the place of our packages, nor in the place of the standard library's or of others."""
    folder = tmp_path / "work"
    for name in ("dipgo", "engines"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text("raise SystemExit('imported from the working directory')")
    for name in ("json", "numbers", "numpy"):
        (folder / f"{name}.py").write_text("raise SystemExit('imported from the working directory')")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", f"{os.environ['PYTHONPATH']}{os.pathsep}")  # an empty entry is where it is run
    with ChildProcess(echo, tmp_path / "log") as child:
        child.send("where")
        assert child.receive(60)[0] == sys.modules["dipgo"].__file__
    monkeypatch.setenv("PYTHONPATH", "modules")  # a relative entry stays what it is
    environment = python_environment()
    assert environment["PYTHONPATH"].split(os.pathsep)[-1] == str(folder / "modules")
    assert environment["PYTHONSAFEPATH"] == "1"


def test_one_that_ends_is_said_in_one_line(echo, tmp_path):
    with ChildProcess(echo, tmp_path / "log") as child:
        child.send(3)
        with refused(r"^its process ended with exit code 3; the last it said: working on 3$", ChildError):
            child.receive(60)
        with refused("exit code 3", ChildError):
            child.send("more")


def test_one_that_hangs_is_ended_with_what_it_started(echo, tmp_path):
    with ChildProcess(echo, tmp_path / "log") as child:
        child.send("start")
        started = psutil.Process(child.receive(60))
        with pytest.raises(ChildError, match=r"^no answer within 0\.1 s, taken for hung and ended$"):
            child.receive(0.1)
        assert child.returncode is not None
    gone, _ = psutil.wait_procs([started], timeout=5)
    assert gone or started.status() == psutil.STATUS_ZOMBIE, "its child is left"
    assert (tmp_path / "log").is_file()
