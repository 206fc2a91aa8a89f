from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import engines
from benchmarks.parity import TOLERANCE, measure, relative_error, verify
from benchmarks.progress import silent
from dipgo.errors import DipgoError
from dipgo.files import sha256_of
from dipgo.search.task import Task
from export.bundle import BundleRecord


def rewrite(folder: Path, change) -> None:
    """Change ``bundle.json`` as somebody would who knows of its checksum."""
    file = folder / "bundle.json"
    record = json.loads(file.read_text())
    change(record)
    record["sha256"] = BundleRecord.model_validate(record).sealed().sha256
    file.write_text(json.dumps(record))


def scale_a_solver_coefficient(folder: Path) -> None:
    def change(record: dict) -> None:
        record["solver"]["rows"][-1][0] *= 1.01

    rewrite(folder, change)


def lose_a_solver_coefficient(folder: Path) -> None:
    def change(record: dict) -> None:
        record["solver"]["rows"][-1][0] = float("nan")

    rewrite(folder, change)


def perturb_the_weights(folder: Path) -> None:
    def change(record: dict) -> None:
        path = folder / record["weights_file"]
        weights = load_file(path)
        name = next(name for name in weights if name.endswith("attn1.to_v.weight"))
        header_and_order = path.read_bytes()
        start = header_and_order.index(weights[name].tobytes())
        altered = bytearray(header_and_order)
        altered[start : start + weights[name].nbytes] = (weights[name] * 1.05).tobytes()
        path.write_bytes(altered)
        record["files"][path.name]["sha256"] = sha256_of(path)

    rewrite(folder, change)


def swap_two_cache_reads(folder: Path) -> None:
    def change(record: dict) -> None:
        for step in record["steps"]:
            names = [name for name in step["reads"] if "transformer_blocks" in name]
            slots = {step["reads"][name] for name in names}
            if len(slots) > 1:
                served = [step["reads"][name] for name in names]
                step["reads"] |= dict(zip(names, served[1:] + served[:1], strict=True))

    rewrite(folder, change)


ALTERATIONS = (scale_a_solver_coefficient, lose_a_solver_coefficient, perturb_the_weights, swap_two_cache_reads)


def test_a_compiled_bundle_has_the_parity_of_the_gated_pipeline(bundle: Path):
    parity = verify(bundle, images=4, seed=5, progress=silent)
    assert parity.passed
    assert 0 < parity.relative_error_latent < TOLERANCE
    assert 0 < parity.relative_error_image < TOLERANCE
    assert (parity.images, parity.seed, parity.tolerance) == (4, 5, 1e-4)


@pytest.mark.parametrize("alter", ALTERATIONS)
def test_an_altered_bundle_fails(bundle: Path, task: Task, tmp_path: Path, alter):
    copy = tmp_path / "altered"
    shutil.copytree(bundle, copy)
    alter(copy)
    with engines.load(copy, threads=1) as program:
        parity = measure(program, task.pipe)
    assert not parity.passed
    assert not parity.relative_error_latent <= TOLERANCE


def test_the_pipeline_is_left_as_it_was(bundle: Path, task: Task):
    scheduler, decode = task.pipe.scheduler, task.pipe.vae.decode
    with engines.load(bundle, threads=1) as program:
        measure(program, task.pipe, images=1)
    assert task.pipe.scheduler is scheduler
    assert task.pipe.vae.decode == decode
    assert not task.pipe.transformer._forward_hooks
    assert not task.pipe.transformer._forward_pre_hooks


def test_another_model_is_refused(bundle: Path, tiny_dit: str, tmp_path: Path):
    other = tmp_path / "other"
    shutil.copytree(tiny_dit, other)
    file = other / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: array * 2 for name, array in load_file(file).items()}, file)
    with pytest.raises(DipgoError, match=r"whose weights .* give the right --model") as caught:
        verify(bundle, str(other), progress=silent)
    assert "\n" not in str(caught.value)


def test_a_model_that_moved_is_found_where_the_user_says(bundle: Path, tiny_dit: str, tmp_path: Path):
    moved = tmp_path / "moved"
    shutil.copytree(bundle, moved)
    rewrite(moved, lambda record: record["model"].update(name=str(tmp_path / "gone")))
    with pytest.raises(DipgoError, match="say where it is with --model"):
        verify(moved, progress=silent)
    assert verify(moved, tiny_dit, images=1, progress=silent).passed


def test_relative_error():
    assert relative_error(np.array([3.0, 4.4]), np.array([3.0, 4.0])) == pytest.approx(0.08)
    assert np.isnan(relative_error(np.array([np.nan, 1.0]), np.array([3.0, 4.0])))
