import json
import shutil

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

import dipgo
from benchmarks.bench.parity import TOLERANCE, measure, verify
from benchmarks.bench.quality import latent_error
from dipgo.base.files import sha256_of
from dipgo.base.progress import silent
from export.records.bundle import BundleRecord
from tests.checks import refused


def rewrite(folder, change):
    """Change ``bundle.json`` as somebody would who knows of its checksum."""
    file = folder / "bundle.json"
    record = json.loads(file.read_text())
    change(record)
    record["sha256"] = BundleRecord.model_validate(record).sealed().sha256
    file.write_text(json.dumps(record))


def reseal(folder, name):
    """Record a file's size and checksum as they are now."""
    path = folder / name
    changed = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    rewrite(folder, lambda record: record["files"].update({name: changed}))


def change_a_table(folder, name, change):
    tables = load_file(folder / "tables.safetensors")
    tables[name] = change(tables[name])
    save_file(tables, folder / "tables.safetensors")
    reseal(folder, "tables.safetensors")


def scale(table, row, factor):
    """Multiply the first entry of a row, counted among those that are not 0: silent steps have none."""
    table[np.flatnonzero(table[:, 0])[row], 0] *= factor
    return table


def scale_a_weight(folder, file, wanted, factor):
    """Scale the first tensor whose name ends so, where it lies in the file: graphs know its offset."""
    path = folder / file
    weights = load_file(path)
    name = next(name for name in weights if name.endswith(wanted))
    altered = bytearray(path.read_bytes())
    start = altered.index(weights[name].tobytes())
    altered[start : start + weights[name].nbytes] = (weights[name] * factor).astype(weights[name].dtype).tobytes()
    path.write_bytes(altered)
    reseal(folder, file)


def perturb_the_weights(folder):
    scale_a_weight(folder, "transformer/diffusion_pytorch_model.safetensors", "attn1.to_v.weight", 1.05)


def swap_two_cache_reads(folder):
    def change(record):
        for step in record["steps"]:
            for launch in step["launches"]:
                names = [name for name in launch["reads"] if "transformer_blocks" in name]
                slots = {launch["reads"][name] for name in names}
                if len(slots) > 1:
                    served = [launch["reads"][name] for name in names]
                    launch["reads"] |= dict(zip(names, served[1:] + served[:1], strict=True))

    rewrite(folder, change)


def add_where_guidance_subtracts(folder):
    """Change the graph of the last launch: ε_c - ε_u becomes ε_c + ε_u."""
    record = json.loads((folder / "bundle.json").read_text())
    name = next(step for step in reversed(record["steps"]) if step["launches"])["launches"][-1]["graph"]
    file = record["graphs"][name]["file"]
    model = onnx.load(str(folder / file), load_external_data=False)
    next(node for node in reversed(model.graph.node) if node.op_type == "Sub").op_type = "Add"
    (folder / file).write_bytes(model.SerializeToString())
    reseal(folder, file)


def change_the_backups(folder):
    name = next(name for name in load_file(folder / "tables.safetensors") if name.startswith("backup."))
    change_a_table(folder, name, lambda table: table * np.float32(1.05))


ALTERATIONS = {
    "an output's coefficient": lambda f: change_a_table(f, "solver.outputs", lambda table: scale(table, 0, 1.01)),
    "a latent's coefficient": lambda f: change_a_table(f, "solver.latents", lambda table: scale(table, -1, 1.01)),
    "no coefficient": lambda f: change_a_table(f, "solver.latents", lambda table: scale(table, -1, float("nan"))),
    "backups": change_the_backups,
    "weights": perturb_the_weights,
    "reads": swap_two_cache_reads,
    "guidance": add_where_guidance_subtracts,
}


def test_a_compiled_bundle_has_the_parity_of_the_gated_pipeline(bundle):
    parity = verify(bundle, images=4, seed=5, progress=silent)
    assert parity.passed
    assert 0 < parity.relative_error_latent < TOLERANCE
    assert 0 < parity.relative_error_image < TOLERANCE
    assert (parity.images, parity.seed, parity.tolerance) == (4, 5, 1e-4)


@pytest.mark.parametrize("alteration", ALTERATIONS)
def test_an_altered_bundle_fails(bundle, task, tmp_path, alteration):
    copy = tmp_path / "altered"
    shutil.copytree(bundle, copy)
    ALTERATIONS[alteration](copy)
    with dipgo.load(copy, threads=1) as program:
        parity = measure(program, task.pipe)
    assert not parity.passed
    assert not parity.relative_error_latent <= TOLERANCE


def test_the_pipeline_is_left_as_it_was(bundle, task):
    scheduler, decode = task.pipe.scheduler, task.pipe.vae.decode
    with dipgo.load(bundle, threads=1) as program:
        measure(program, task.pipe, images=1)
    assert task.pipe.scheduler is scheduler
    assert task.pipe.vae.decode == decode
    assert not task.pipe.transformer._forward_hooks
    assert not task.pipe.transformer._forward_pre_hooks


def test_another_model_is_refused_and_one_that_moved_is_found_where_the_user_says(bundle, tiny_dit, tmp_path):
    other, moved = shutil.copytree(tiny_dit, tmp_path / "other"), shutil.copytree(bundle, tmp_path / "moved")
    file = other / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: array * 2 for name, array in load_file(file).items()}, file)
    with refused(r"whose weights .* give the right --model"):
        verify(bundle, str(other), progress=silent)
    rewrite(moved, lambda record: record["model"].update(name=str(tmp_path / "gone")))
    with refused("say where it is with --model"):
        verify(moved, progress=silent)
    assert verify(moved, tiny_dit, images=1, progress=silent).passed


def test_relative_error():
    assert latent_error(np.array([3.0, 4.4]), np.array([3.0, 4.0])) == pytest.approx(0.08)
    assert np.isnan(latent_error(np.array([np.nan, 1.0]), np.array([3.0, 4.0])))
