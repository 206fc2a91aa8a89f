"""``import dipgo``: light, typed, and one line where something else has the name of one of our packages."""

import json
import os
import re
import subprocess
import sys

import pytest

import dipgo
from dipgo.graph.facts import counted, families, pipelines, read_facts
from dipgo.model.models import architectures, built_in, find_model
from tests.checks import ROOT, misused
from tests.zoo import LEAST


def python(code, cwd, *flags, **environment):
    given = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    command = [sys.executable, *flags, *(["-c", code] if code else [])]
    path = {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=given | path)


def shadow(folder, name):
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text("raise SystemExit('imported from elsewhere')")


def test_import_is_light_and_names_are_there():
    code = "import dipgo, sys; print({'torch', 'numpy', 'pydantic', 'typer'} & sys.modules.keys()); dipgo.load; "
    code += "print('torch' in sys.modules)"
    done = python(code, ROOT)
    assert done.stdout == "set()\nFalse\n", done.stderr
    assert all(getattr(dipgo, name) is not None for name in dipgo.__all__)
    with pytest.raises(AttributeError, match="no attribute 'serach'"):
        _ = dipgo.serach


def test_search_export_verify_and_run(tiny_dit, tmp_path, capsys):
    subnet = dipgo.search(tiny_dit, steps=4, budget=0.6, preset="quick", **LEAST)
    assert isinstance(subnet, dipgo.SubNet)
    assert capsys.readouterr().err == "", "nothing is shown where nobody looks"
    dipgo.export(subnet, tmp_path / "bundle", batch=2)
    assert dipgo.verify(tmp_path / "bundle", images=1).passed
    with dipgo.load(tmp_path / "bundle") as pipe:
        assert len(pipe(class_labels=[1, 2], generator=0).images) == 2
    bundle = dipgo.compile(tiny_dit, tmp_path / "all", steps=4, budget=0.6, preset="quick", **LEAST)
    assert json.loads((tmp_path / "all" / "subnet.json").read_text())["gates"] == subnet.gates.astype(int).tolist()
    assert dipgo.verify(bundle, images=1, progress=True).passed
    assert "verify" in capsys.readouterr().err
    with misused("give another path"):
        dipgo.compile(tiny_dit, tmp_path / "all", steps=4, budget=0.6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 4}, "budget is missing"),
        ({"steps": 4, "budget": 0.5, "polo": 3}, "unknown option 'polo'; did you mean 'pool'?"),
        ({"steps": 4, "budget": "0.5,0.4"}, "give one budget"),
    ],
)
def test_bad_options_are_one_line(options, message):
    with misused(re.escape(message)):
        dipgo.search("digits-dit", **options)


@pytest.mark.parametrize("name", ["export", "engines", "benchmarks"])
def test_a_shadowed_package_is_one_line(name, tmp_path):
    """From Python the script's folder comes first on the path, and PYTHONPATH may have anything."""
    shadow(tmp_path, name)
    said = f"{tmp_path / name / '__init__.py'} is imported, not dipgo's package '{name}'; rename it"
    done = python("import dipgo; dipgo.load('x')", tmp_path)
    assert f"DipgoError: {said}" in done.stderr.splitlines()[-1]
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = python(None, ROOT.parent, "-P", "-m", "dipgo", "models", PYTHONPATH=path)
    assert (done.returncode, done.stderr.startswith(f"dipgo: {said}"), len(done.stderr.splitlines())) == (1, True, 1)


def test_the_command_line_imports_nothing_from_the_working_directory(tmp_path):
    for name in ("export", "engines", "benchmarks", "numpy", "yaml"):
        shadow(tmp_path, name)
    done = python(None, tmp_path, "-m", "dipgo", "recipe", "validate", "digits-dit")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_stored_counts_are_those_of_the_models():
    facts = read_facts()
    assert list(facts.models) == [*built_in(), *architectures()]
    assert {name: counted(find_model(name)) for name in facts.models} == facts.models
    assert families() == facts.families


def test_pipelines_that_run_are_those_of_the_count():
    assert pipelines(ROOT / "benchmarks" / "results" / "dummies.json") == read_facts().pipelines


def test_models_are_listed_without_counting(tmp_path):
    code = "import sys; sys.argv = ['dipgo', 'models']; import atexit; "
    code += "atexit.register(lambda: print('torch' in sys.modules)); from dipgo.cli.main import main; main()"
    done = python(code, ROOT)
    assert "digits-dit: DiTTransformer2DModel, " in done.stdout
    assert done.stdout.endswith("False\n")


@pytest.mark.parametrize("package", ["dipgo", "export", "engines", "benchmarks"])
def test_types_are_for_users_too(package):
    assert (ROOT / package / "py.typed").is_file()
