"""Where a bundle's files go, and what is left behind when something fails."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import dipgo
from dipgo.base.errors import DipgoError, UsageError
from dipgo.model.models import find_model
from export.bundle import open_bundle
from export.compiler import compile_subnet, write_bundle
from export.component_weights import weights_of
from export.components import components_of
from export.config import ExportConfig
from export.converted import cache_folder
from tests import checks, zoo
from tests.models import random_subnet

IN_PLACE = ExportConfig(weights="in-place")
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def pristine():
    return zoo.model("dit").folder


@pytest.fixture
def model(pristine, tmp_path):
    shutil.copytree(pristine, tmp_path / "model")
    return find_model(str(tmp_path / "model"))


def converted(model, dtype):
    """Return what converting the model, which is a copy of the zoo's, would give."""
    prepared = zoo.converted(zoo.trace("dit", dtype=dtype))
    parts = (model.family.component, *components_of(model))
    weights = [weights_of(model, part, dtype, cache_folder(model)) for part in parts]
    denoiser = replace(prepared.denoiser, trace=replace(prepared.trace, model=model))
    return replace(prepared, denoiser=denoiser, weights=weights)


def compiled(model, folder, options=ExportConfig(), dtype=torch.float32, seed=0, force=False):
    prepared, sampler = converted(model, dtype), zoo.sampler("dit", 4)
    subnet = random_subnet(prepared.trace, sampler, seed, terms=2, channels=1)
    return write_bundle(prepared, subnet, sampler, folder, force, options)


@pytest.fixture(scope="module")
def subnet():
    """A SubNet of every model here: they are copies of one."""
    return random_subnet(zoo.trace("dit"), zoo.sampler("dit", 4), 0)


@pytest.fixture
def refused(model, subnet, monkeypatch):
    """Compile as the command line does, and return the line of the refusal, which comes before the model is traced."""

    def traced(*_, **__):
        raise AssertionError("traced already")

    monkeypatch.setattr("export.compiler.trace", traced)

    def refused(folder, kind=UsageError, force=True, dtype="fp32", weights="copy"):
        before = contents(model.folder.parent)
        with checks.refused(".", kind) as caught:
            compile_subnet(subnet, model, folder, ExportConfig(dtype=dtype, weights=weights), force)
        assert contents(model.folder.parent) == before
        return str(caught.value)

    return refused


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_in_place_copies_nothing_and_equals_the_copy(model, tmp_path):
    before = contents(model.folder)
    compiled(model, tmp_path / "copy")
    record = compiled(model, model.folder, IN_PLACE)
    after = contents(model.folder)
    assert {name: after[name] for name in before} == before
    assert not [name for name in after.keys() - before.keys() if "/" in name]
    assert not any(name.startswith(".") for name in os.listdir(model.folder))
    held = {name for name in record.files if "/" in name}
    assert held == {"transformer/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"}
    with dipgo.load(model.folder) as here, dipgo.load(tmp_path / "copy") as there:
        assert np.array_equal(here.generate([0, 1], 3), there.generate([0, 1], 3))


def test_in_place_again_replaces_the_bundle_alone(model):
    before = contents(model.folder)
    compiled(model, model.folder, IN_PLACE)
    first = set(contents(model.folder))
    with checks.misused("--force replaces the bundle"):
        compiled(model, model.folder, IN_PLACE, seed=1)
    record = compiled(model, model.folder, ExportConfig(graphs="segment", weights="in-place"), seed=1, force=True)
    after = contents(model.folder)
    assert {name: after[name] for name in before} == before
    graphs = {f"{name}.onnx" for name in record.graphs}
    assert graphs <= set(after)
    assert not {name for name in first - set(before) if name.endswith("1x4x8x8.onnx")} & set(after) - graphs
    open_bundle(model.folder)


def test_copies_follow_links(model, tmp_path):
    weights = model.folder / WEIGHTS
    shutil.move(weights, tmp_path / "blob")
    weights.symlink_to(tmp_path / "blob")
    compiled(model, tmp_path / "b")
    copy = tmp_path / "b" / WEIGHTS
    assert not copy.is_symlink()
    assert copy.stat().st_nlink == 1
    with dipgo.load(tmp_path / "b") as program:
        assert np.isfinite(program.generate([0], 0)).all()


def test_half_precision_is_cast_once_and_in_place_says_so(model, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    record = compiled(model, tmp_path / "b", dtype=torch.float16)
    assert record.dtype == "float16"
    (weights,) = [name for name in record.files if name.startswith("transformer/")]
    own = model.folder / WEIGHTS
    assert record.files[weights].bytes < 0.55 * own.stat().st_size
    with checks.misused("another precision than the graphs"):
        compiled(model, model.folder, IN_PLACE, dtype=torch.float16)
    with checks.misused(r"lies beside the checkpoint; give -o .*model"):
        compiled(model, tmp_path / "c", IN_PLACE)
    assert not (model.folder / "bundle.json").exists()
    assert not (tmp_path / "c").exists()


def test_copies_never_take_the_place_of_the_model(model, refused):
    (model.folder / "bundle.json").write_text("{}")
    link = model.folder.parent / "link"
    link.symlink_to(model.folder)
    for folder in (model.folder, model.folder.parent, link):
        for force in (True, False):
            assert "which a bundle in its place would delete; give another -o" in refused(folder, force=force)
    assert "transformer: holds no bundle.json, so --force does not replace it" in refused(model.folder / "transformer")
    other = shutil.copytree(model.folder, model.folder.parent / "other")  # a bundle of its own, beside its weights
    (other / "bundle.json").write_text(json.dumps({"schema": "dipgo.bundle/1", "weights": "in-place"}))
    assert "other: is a pipeline's own folder (model_index.json)" in refused(other)


def test_in_place_is_refused_before_the_work(model, refused, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = model.folder
    assert f"lies beside the checkpoint; give -o {folder}" in refused(tmp_path / "b", weights="in-place")
    assert "another precision than the graphs" in refused(folder, weights="in-place", dtype="fp16")
    assert not (tmp_path / "cache").exists()
    blob = tmp_path / "blob"
    shutil.move(folder / "vae" / "diffusion_pytorch_model.safetensors", blob)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").symlink_to(blob)
    assert "symbolic link; export with --weights copy" in refused(folder, DipgoError, weights="in-place")
    (folder / "bundle.json").write_text('{"files": []}')
    assert "--force replaces the bundle that lies" in refused(folder, force=False, weights="in-place")
    assert "not a bundle's record; remove it" in refused(folder, DipgoError, weights="in-place")


def test_in_place_replaces_no_file_of_the_user(model, refused):
    mine = model.folder / "subnet.json"
    mine.write_text("mine")
    assert f"{mine} belongs to no bundle" in refused(model.folder, weights="in-place")
    mine.rename(model.folder / "vae_decoder.onnx")
    before = contents(model.folder)
    with checks.misused(r"vae_decoder\.onnx belongs to no bundle.*; move it away, or"):
        compiled(model, model.folder, IN_PLACE)
    assert contents(model.folder) == before
    assert not any(name.startswith(".") for name in os.listdir(model.folder))
    (model.folder / "vae_decoder.onnx").unlink()
    compiled(model, model.folder, IN_PLACE)
    (model.folder / "subnet.json").write_text("mine")
    assert "subnet.json belongs to no bundle, or was changed since" in refused(model.folder, weights="in-place")
    (model.folder / "subnet.json").unlink()
    compiled(model, model.folder, IN_PLACE, force=True)
    assert open_bundle(model.folder).record.files["subnet.json"]


@pytest.mark.parametrize(("before", "moved"), [("nothing", 1), ("a bundle", 0), ("a bundle", 3)])
def test_in_place_an_interruption_leaves_what_the_next_export_replaces(model, monkeypatch, before, moved):
    own = contents(model.folder)
    if before == "a bundle":
        compiled(model, model.folder, ExportConfig(weights="in-place", graphs="step"))
    calls, replace = [], Path.replace

    def interrupted(path, target):
        if target.parent == model.folder and path.parent.name.startswith(".bundle.dipgo-"):
            calls.append(path)
            if len(calls) > moved:
                raise KeyboardInterrupt
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compiled(model, model.folder, IN_PLACE, seed=1, force=True)
    assert len(calls) == moved + 1
    with checks.refused(r"schema is 'dipgo\.bundle/unfinished'.*export it again"):
        open_bundle(model.folder)
    compiled(model, model.folder, IN_PLACE, seed=1, force=True)
    record = open_bundle(model.folder).record
    files = {name for name in record.files if "/" not in name}
    assert set(contents(model.folder)) - set(own) == files | {"bundle.json"}


def test_a_failure_in_place_leaves_the_folder_as_it_was(model, monkeypatch):
    before = contents(model.folder)

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("export.compiler.save_file", full_disk)
    with checks.refused("disk is full"):
        compiled(model, model.folder, IN_PLACE)
    assert contents(model.folder) == before
    assert not [name for name in os.listdir(model.folder) if name.startswith(".")]
