"""`dipgo doctor` tells the truth about this machine, in real processes."""

import json
import os
import platform

import onnxruntime
import torch

from engines.backends import BACKENDS
from tests.checks import ROOT, python

SCRIPT = "import typer; from dipgo.cli.doctor import doctor; typer.run(doctor)"


def run(*arguments, **environment):
    return python(SCRIPT, *arguments, env=os.environ | environment, cwd=ROOT).stdout


def test_findings_are_those_of_this_machine(tmp_path):
    (tmp_path / "dipgo" / "m").mkdir(parents=True)
    (tmp_path / "dipgo" / "m" / "weights").write_bytes(bytes(12345))
    found = json.loads(run("--json", XDG_CACHE_HOME=str(tmp_path)))
    assert found["python"]["version"] == platform.python_version()
    assert found["packages"]["torch"] == torch.__version__
    assert found["packages"]["onnxruntime"] == onnxruntime.__version__
    assert found["onnxruntime_providers"] == onnxruntime.get_available_providers()
    assert len(found["cuda_devices"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    assert list(found["backends"]) == list(BACKENDS)
    assert found["backends"]["onnxruntime"] == "usable"
    assert found["import_clashes"] == {}
    assert found["verdict"][0].startswith("bundles run on the CPU by onnxruntime")
    assert found["verdict"][-1] == "models can be searched and exported"
    assert found["cache"] == {"folder": str(tmp_path / "dipgo"), "bytes": 12345}


def test_without_torch_bundles_run_and_one_line_says_what_else_to_install():
    done = python(SCRIPT, without="torch", env=os.environ, cwd=ROOT)
    verdict = done.stdout.partition("verdict:\n")[2].splitlines()
    assert verdict[0] == "  bundles run on the CPU by onnxruntime"
    assert verdict[-1] == "  to search and export, run: pip install 'dipgo[search]'"


def test_clashing_names_and_missing_packages_are_told(tmp_path):
    """Another package named engines comes first on the path; onnxruntime cannot be imported."""
    (tmp_path / "engines").mkdir()
    (tmp_path / "engines" / "__init__.py").write_text("")
    (tmp_path / "engines" / "backends.py").write_text(
        "from types import SimpleNamespace as Entry\n"
        "BACKENDS = {'onnxruntime': Entry(module='x'), 'torch': Entry(module='no_such_module')}"
    )
    (tmp_path / "onnxruntime").mkdir()
    (tmp_path / "onnxruntime" / "__init__.py").write_text("raise ImportError('onnxruntime')")
    text = run(PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}", PYTHONSAFEPATH="1")
    assert f"engines: {tmp_path / 'engines' / '__init__.py'} is imported, not dipgo's" in text
    assert "give dipgo an environment of its own" in text
    assert "onnxruntime  run: pip install 'dipgo[cpu]'" in text
    assert text.splitlines()[-1] == "  nothing can be relied on: give dipgo an environment of its own"
    assert "torch        No module named 'no_such_module'" in text
