"""The wheel: everything that is used at run time is in it, and what it asks for fits together."""

from __future__ import annotations

import email
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("dipgo", "export", "engines", "benchmarks")
LARGEST = 40e6  # bytes
LEFT_OUT = (".png", "tokenizer/vocab.json", "tokenizer/merges.txt")  # pictures, and what tokenizer.json says
KEPT = (
    "benchmarks/results/",
    "benchmarks/subnets/",
    "benchmarks/RESULTS.md",
)  # in the repository alone, as model cards' pictures are


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of a copy of the packages, so that nothing is left in the repository."""
    source = tmp_path_factory.mktemp("source")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True, check=True)
    return zipfile.ZipFile(source / done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def metadata(wheel):
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    return email.message_from_bytes(wheel.read(name))


def test_all_files_that_git_has_are_in_it(wheel):
    tracked = subprocess.run(["git", "ls-files", *PACKAGES], cwd=ROOT, capture_output=True, text=True, check=True)
    names = set(wheel.namelist())
    due = [file for file in tracked.stdout.split() if not file.startswith(KEPT) and not file.endswith(LEFT_OUT)]
    missing = [file for file in due if file not in names]
    assert missing == []
    assert {"benchmarks/subnets/emoji-sd/ddim-50/layer.json", "dipgo/zoo/emoji-sd/model_index.json"} <= names
    assert not [name for name in names if name.startswith(("tests/", "training/", "examples/"))]


def test_it_is_small(wheel):
    assert sum(entry.compress_size for entry in wheel.infolist()) < LARGEST


def requirements(metadata, extra=""):
    """Return the names that the package, or one of its extras, asks for."""
    lines = metadata.get_all("Requires-Dist")
    own = [line for line in lines if (f'extra == "{extra}"' in line if extra else "extra ==" not in line)]
    return {re.split(r"[^\w.-]", line)[0].lower() for line in own}


def test_running_is_apart_from_searching(metadata):
    base = requirements(metadata)
    assert {"numpy", "tokenizers", "pillow", "pydantic", "typer"} <= base
    assert not base & {"torch", "diffusers", "transformers", "onnx", "onnxruntime", "matplotlib"}
    assert {"torch", "diffusers", "transformers", "onnx"} <= requirements(metadata, "search")


def test_no_extra_puts_both_onnxruntime_side_by_side(metadata):
    extras = metadata.get_all("Provides-Extra")
    assert {"search", "cpu", "cuda", "tensorrt", "tensorrt-rtx", "debug", "serving", "dev"} <= set(extras)
    bringing = {extra: requirements(metadata, extra) & {"onnxruntime", "onnxruntime-gpu"} for extra in extras}
    assert {extra: names for extra, names in bringing.items() if names} == {
        "cpu": {"onnxruntime"},
        "cuda": {"onnxruntime-gpu"},
    }


def test_metadata_says_what_an_index_shows(metadata):
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["License-File"] == "LICENSE"
    assert metadata["Version"] == __import__("dipgo").__version__
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata["Keywords"]
    assert any(line.startswith("Development Status") for line in metadata.get_all("Classifier"))
