"""The model repository that is written for Triton, and what is refused before anything is written."""

import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import dipgo
from dipgo.base.errors import DipgoError, UsageError
from engines.serving.install import REQUIREMENTS, find_server
from engines.serving.limits import Limits
from engines.serving.repository import Deployment, write_repository
from export.bundle import open_bundle
from export.compiler import write_bundle
from tests import zoo
from tests.models import random_subnet


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    traced, sampler = zoo.trace("dit"), zoo.sampler("dit", 4)
    folder = tmp_path_factory.mktemp("serving") / "bundle"
    write_bundle(zoo.converted(traced), random_subnet(traced, sampler, 0), sampler, folder)
    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_repository_holds_the_bundle_and_no_more(bundle, tmp_path):
    (bundle / "notes.txt").write_text("of the user")
    model = write_repository(bundle, tmp_path / "models", Deployment(name="digits"))
    (bundle / "notes.txt").unlink()
    assert model == tmp_path / "models" / "digits"
    assert contents(model / "1" / "bundle") == contents(bundle)
    assert open_bundle(model / "1" / "bundle").record == open_bundle(bundle).record
    assert (model / "warmup" / "class").read_bytes() == b"\x03\0\0\0cat"
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in model.rglob("*"))  # the server has a user of its own


def test_a_link_copies_nothing(bundle, tmp_path):
    model = write_repository(bundle, tmp_path, Deployment(link=True))
    assert (model / "1" / "bundle").is_symlink()
    assert (model / "1" / "bundle").resolve() == bundle.resolve()


def test_a_repository_takes_several_models_and_replaces_none_unasked(bundle, tmp_path):
    for name in ("a", "b"):
        write_repository(bundle, tmp_path, Deployment(name=name))
    before = contents(tmp_path)
    with pytest.raises(UsageError, match=r"a exists; give another path, or --force"):
        write_repository(bundle, tmp_path, Deployment(name="a"))
    assert contents(tmp_path) == before
    write_repository(bundle, tmp_path, Deployment(name="a", instances=3), force=True)
    assert "count: 3" in (tmp_path / "a" / "config.pbtxt").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_another_s_model_is_never_replaced(bundle, tmp_path):
    """Every Triton model has a ``config.pbtxt``."""
    theirs = tmp_path / "resnet"
    (theirs / "1").mkdir(parents=True)
    (theirs / "1" / "model.onnx").write_bytes(b"theirs")
    (theirs / "config.pbtxt").write_text('name: "resnet"')
    before = contents(tmp_path)
    with pytest.raises(UsageError, match=r"resnet: holds no 1/bundle/bundle\.json, so --force does not replace it"):
        write_repository(bundle, tmp_path, Deployment(name="resnet"), force=True)
    assert contents(tmp_path) == before


def test_a_linked_model_is_replaced_and_its_bundle_stays(bundle, tmp_path):
    before = contents(bundle)
    for _ in range(2):
        write_repository(bundle, tmp_path, Deployment(name="a", link=True), force=True)
    assert contents(bundle) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_a_copy_is_not_linked_to_itself(bundle, tmp_path):
    model = write_repository(bundle, tmp_path, Deployment(name="a"))
    before = contents(tmp_path)
    with pytest.raises(UsageError, match=r"1/bundle: is the copy that the link would replace"):
        write_repository(model / "1" / "bundle", tmp_path, Deployment(name="a", link=True), force=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("deployment", "message"),
    [
        ({"name": "../up"}, "model name '../up' does not fit a URL"),
        ({"name": 'a"b'}, "does not fit a URL"),
        ({"backend": "abacus"}, "unknown backend 'abacus'"),
    ],
)
def test_what_cannot_be_is_refused(bundle, tmp_path, deployment, message):
    with pytest.raises(UsageError, match=message):
        write_repository(bundle, tmp_path / "models", Deployment(**deployment))
    assert not (tmp_path / "models").exists()


def test_limits_are_above_zero():
    with pytest.raises(UsageError, match="limit 'images' is -1; give more than 0"):
        Limits(images=-1)


def test_damaged_bundles_are_refused_and_leave_nothing(bundle, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(bundle, broken)
    weights = next(broken.glob("transformer/*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(DipgoError, match=r"safetensors: altered since the bundle was made"):
        write_repository(broken, tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_a_bundle_without_decoder_has_no_images_to_serve(bundle, tmp_path):
    shutil.copytree(bundle, tmp_path / "bundle")
    record = open_bundle(bundle).record.model_copy(update={"decoder": None})
    (tmp_path / "bundle" / "bundle.json").write_text(record.sealed().text())
    with pytest.raises(DipgoError, match="holds no VAE decoder, so there are no images to serve; export a pipeline"):
        write_repository(tmp_path / "bundle", tmp_path / "models")
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize("link", [False, True])
def test_a_bundle_without_engines_is_not_for_tensorrt(bundle, tmp_path, link):
    with pytest.raises(DipgoError, match=r"holds no TensorRT engines; run: dipgo build .*bundle --backend tensorrt$"):
        write_repository(bundle, tmp_path / "models", Deployment(backend="tensorrt", link=link))
    assert not (tmp_path / "models").exists()


def test_without_a_server_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_SERVER", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    if Path("/opt/tritonserver").exists():
        pytest.skip("a Triton is installed where its container has it")
    with pytest.raises(DipgoError, match=r"tritonserver is not on this machine's PATH; run: .*pytriton") as error:
        find_server()
    assert "\n" not in str(error.value)
    assert str(REQUIREMENTS) in str(error.value)
    with pytest.raises(DipgoError, match="holds no tritonserver"):
        find_server(tmp_path)


def closure(*requirements):
    """Return names of packages with all that they depend on, dipgo among them."""
    allowed, new = {"dipgo"}, {Requirement(line).name for line in requirements}
    while new := {name.lower().replace("_", "-") for name in new} - allowed:
        allowed |= new
        needed = [Requirement(line) for name in new for line in requires(name) or []]
        new = {each.name for each in needed if not each.marker or each.marker.evaluate()}
    return allowed


def blocked_but(allowed):
    """Return the import names of everything that is installed here and not allowed."""
    owners = packages_distributions()
    return [name for name, by in owners.items() if not {owner.lower().replace("_", "-") for owner in by} & allowed]


def listed():
    return [line for line in REQUIREMENTS.read_text().splitlines() if not line.startswith("#")]


def test_serving_needs_what_its_requirements_list_and_no_more(bundle):
    """A real process, in which nothing can be imported but these packages and what they depend on.

    What dipgo's own files import there is listed itself, not only among what others depend on.
    """
    blocked = blocked_but(closure(*listed()))
    assert {"torch", "diffusers", "transformers", "typer", "jinja2"} <= set(blocked)
    script = f"""
import ast, sys, types
sys.modules.update(dict.fromkeys({blocked}))
sys.modules["triton_python_backend_utils"] = types.ModuleType("triton_python_backend_utils")
import engines.serving.__main__, engines.serving.model
from engines.serving.requests import Row, render
import dipgo
with dipgo.load({str(bundle)!r}) as program:
    print(*render([Row(program, 1, None, 5, 1)])[0].ravel())
own = [module for name, module in sys.modules.items() if name.split(".")[0] in ("dipgo", "engines", "export")]
bodies = [node for module in own for node in ast.parse(open(module.__file__).read()).body]
froms = {{node.module for node in bodies if isinstance(node, ast.ImportFrom)}}
plain = {{alias.name for node in bodies if isinstance(node, ast.Import) for alias in node.names}}
print(*{{name.split(".")[0] for name in froms | plain}})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    levels, imported = done.stdout.splitlines()
    with dipgo.load(bundle) as program:
        expected = (program.generate([1], 5) * 255).round()
    assert [int(level) for level in levels.split()] == expected.ravel().tolist()
    owners = packages_distributions()
    packages = {owner.lower().replace("_", "-") for name in imported.split() for owner in owners.get(name, ())}
    assert packages - {"dipgo"} <= {Requirement(line).name for line in listed()}


def test_the_command_line_needs_the_one_line_more_that_the_docs_give(bundle, tmp_path):
    """Running and deploying in real processes that can import no more; building without torch is one line."""
    docs = (Path(__file__).parents[2] / "docs" / "guides" / "backends.md").read_text()
    more = re.search(r"^pip install -r \S*requirements\.txt && .*\npip install (.*)$", docs, re.MULTILINE)
    blocked = blocked_but(closure(*listed(), *shlex.split(more.group(1))))
    assert {"torch", "diffusers", "transformers"} <= set(blocked)
    script = f"import sys; sys.modules.update(dict.fromkeys({blocked})); from dipgo.cli.main import main; main()"

    def dipgo(*arguments):
        command = [sys.executable, "-c", script, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    for arguments in (
        ("run", bundle, "-o", tmp_path / "image.png", "--class", "1"),
        ("deploy", bundle, "--triton", tmp_path / "models"),
        ("inspect", bundle),
        ("doctor",),
    ):
        done = dipgo(*arguments)
        assert (done.returncode, done.stderr.count("Traceback")) == (0, 0), done.stderr
    assert (tmp_path / "image.png").is_file()
    assert len(list(tmp_path.glob("models/*/config.pbtxt"))) == 1
    done = dipgo("build", bundle, "--backend", "torch-aot")
    assert (done.returncode, done.stderr) == (1, "dipgo: torch is not installed; run: pip install torch\n")
