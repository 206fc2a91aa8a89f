"""A bundle with anything missing or altered is refused in one line."""

import contextlib
import json
import os
import shutil

import jsonschema
import numpy as np
import onnx
import pytest
from pydantic import ValidationError
from safetensors.numpy import load_file, save_file

import dipgo
from dipgo.base.files import sha256_of
from dipgo.model.models import find_model
from export.bundle import open_bundle
from export.compiler import compile_subnet, write_bundle
from export.records.bundle import SCHEMA_FILE, BundleRecord, json_schema
from tests import zoo
from tests.checks import misused, refused
from tests.models import random_subnet

STEPS = 4


@pytest.fixture(scope="module")
def prepared(task):
    return zoo.converted(task.trace)


@pytest.fixture
def bundle(task, tmp_path):
    """A bundle to spoil."""
    subnet = random_subnet(task.trace, task.sampler, seed=0, terms=2, channels=1)
    return shutil.copytree(zoo.bundle(task.trace, task.sampler, subnet), tmp_path / "b")


def test_schema(bundle):
    jsonschema.validate(json.loads((bundle / "bundle.json").read_text()), json.loads(SCHEMA_FILE.read_text()))
    assert json.loads(SCHEMA_FILE.read_text()) == json_schema()


@pytest.mark.parametrize(
    "name",
    ["transformer/diffusion_pytorch_model.safetensors", "vae_decoder.onnx", "tables.safetensors", "subnet.safetensors"],
)
@pytest.mark.parametrize("damage", ["missing", "altered", "truncated"])
def test_damaged_files_are_refused(bundle, name, damage):
    path = bundle / name
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "altered":
        data[-1] ^= 1
        path.write_bytes(data)
    else:
        path.write_bytes(data[:-1])
    with refused(f"{name}: (missing|altered|not a safetensors file).*export it again"):
        open_bundle(bundle)


def test_an_altered_program_is_refused(bundle):
    document = json.loads((bundle / "bundle.json").read_text())
    document["steps"][1]["timestep"] += 1
    (bundle / "bundle.json").write_text(json.dumps(document))
    with refused(r"bundle\.json: altered since the bundle was made"):
        open_bundle(bundle)


def reseal(folder, change, checksums=True):
    """Change a record as somebody would who makes its checksums fit."""
    document = json.loads((folder / "bundle.json").read_text())
    change(document)
    for name, entry in document["files"].items() if checksums else ():
        entry |= {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}
    with contextlib.suppress(ValidationError, ValueError):
        document = json.loads(BundleRecord.model_validate(document).sealed().text())
    (folder / "bundle.json").write_text(json.dumps(document))


def launch(record, number=0):
    return record["steps"][number]["launches"][0]


def graph(record):
    return next(iter(record["graphs"].values()))


def swap_files(record):
    first, second, *_ = record["graphs"].values()
    first["file"], second["file"] = second["file"], first["file"]


CONTRADICTIONS = {
    "slot negative": (lambda r: launch(r)["writes"].update(next=-1), "writes.next: Input should be greater than"),
    "slot not there": (lambda r: launch(r)["writes"].update(next=99), "'next' of .* does not fit into slot 99"),
    "slot of another shape": (lambda r: r["slots"][0].update(shape=[1, 4, 9, 8]), "slot 0 is to hold a latent"),
    "slot shape negative": (
        lambda r: r["slots"][0].update(shape=[1, 4, -8, 8]),
        "should be greater than or equal to 0",
    ),
    "slot shape empty": (lambda r: r["slots"][0].update(shape=[1, 0, 8, 8]), r"\[1, 0, 8, 8\] is no shape of a tensor"),
    "slot shape huge": (lambda r: r["slots"][0].update(shape=[2**30, 4, 2**30, 8]), "is no shape of a tensor"),
    "slot type": (lambda r: r["slots"][0].update(dtype="float31"), "slots.0.dtype: String should match pattern"),
    "no latent": (lambda r: r["latent"].update(shape=[]), r"'latent' is \[\], not \[batch, channels, height, width\]"),
    "no cells": (lambda r: r.update(cell=0), "cell: Input should be greater than"),
    "no graphs": (lambda r: r.update(graphs={}), "graphs: Dictionary should have at least 1 item"),
    "no parts": (lambda r: r.update(parts=[]), "parts: List should have at least 1 item"),
    "no steps": (lambda r: r.update(steps=[]), "steps: List should have at least 1 item"),
    "a step missing": (lambda r: r["steps"].pop(), "'steps' are not at the timesteps of 'sampler'"),
    "silent steps": (lambda r: r.update(steps=r["steps"][:1] * 20_000), "steps: List should have at most 2000 items"),
    "silence first": (lambda r: r["steps"][0].update(launches=[]), "step 0 launches nothing"),
    "graph not there": (lambda r: launch(r).update(graph="x"), "launches 'x', which is none of its graphs"),
    "graphs swapped": (swap_files, "has other inputs or outputs than the record says"),
    "a read without a name": (lambda r: launch(r)["reads"].update(x=0), "'x' of .* does not fit into slot 0"),
    "an input without a value": (lambda r: launch(r, 1).update(reads={}), "nothing that fits is given to"),
    "a row without a table": (lambda r: graph(r)["rows"].clear(), "nothing that fits is given to"),
    "a term too far": (
        lambda r: [row.update(term=9) for part in r["graphs"].values() for row in part["rows"].values()],
        "nothing that fits is given to",
    ),
    "no prologues": (lambda r: r.update(prologues=[]), "nothing that fits is given to"),
    "parts not there": (lambda r: r["parts"][0].update(part="x"), "parts.0.part: Input should be"),
    "class out of range": (lambda r: r["conditioning"].update(null_class=10**40), "null_class: Input should be less"),
    "no class": (lambda r: r["conditioning"].update(null_class=None), "guided, without a class that stands for none"),
    "conditions": (lambda r: r["conditioning"].update(inputs=[]), "nothing that fits|conditioned by class, with 0 inp"),
    "axes": (
        lambda r: r.update(axes={"batch": {"min": 1, "opt": 1, "max": 2}}),
        "'axes' are not the sizes that 'latent' leaves",
    ),
    "axes backwards": (lambda r: r.update(axes={"batch": {"min": 3, "opt": 1, "max": 2}}), "must be multiples"),
    "sizes": (lambda r: r["decoder"]["output"].update(shape=["1/0", 3, 64, 64]), "'1/0' is no size over no axes"),
    "pixels": (lambda r: r.update(cell=4), "no images with 4 pixels for each cell"),
    "nesting": (
        lambda r: r["sampler"]["config"].update(x=json.loads("[" * 500 + "]" * 500)),
        "nested more than 64 lev",
    ),
    "trained steps": (lambda r: r["sampler"]["config"].update(num_train_timesteps=-5), "num_train_timesteps is -5"),
    "draws": (lambda r: r["solver"].update(kind="graph", draws=3), "draws noise, which graphs are not given"),
    "draws more": (lambda r: r["solver"].update(kind="host", draws=3), r"'solver.rows' is not \[5, 8\] finite"),
    "escapes": (lambda r: r["model"].update(name="\x1b[2J"), "model.name: String should match pattern"),
    "NaN": (lambda r: r["steps"][0].update(timestep=float("nan")), "timestep: Input should be less than"),
    "fields": (lambda r: r["solver"].update(dict.fromkeys(map(str, range(5000)))), "no record of this kind"),
}


@pytest.mark.parametrize("name", list(CONTRADICTIONS))
def test_records_that_contradict_are_refused(bundle, name):
    """Whoever makes a bundle on purpose makes its checksum fit, too."""
    change, message = CONTRADICTIONS[name]
    reseal(bundle, change)
    with refused(message) as caught:
        open_bundle(bundle)
    assert str(caught.value).startswith(f"{bundle / 'bundle.json'}: ")
    assert "export it again" in str(caught.value) or name == "nesting"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tables: tables.pop("solver.rows"), r"the table 'solver.rows' is not \[5, 5\] finite numbers"),
        (lambda tables: tables["solver.rows"].fill(np.nan), "the table 'solver.rows' is not"),
        (lambda tables: tables.update({"solver.input_scale": np.ones(9)}), "'solver.input_scale' is not"),
        (lambda tables: tables.update({"solver.rows": np.ones((5, 5), np.int64)}), "of the type I64"),
        (lambda tables: tables.update({name: table[:0] for name, table in tables.items()}), "is not"),
        (lambda tables: [tables.pop(name) for name in list(tables) if name.startswith("backup")], "nothing that fits"),
        (
            lambda tables: tables.update({n: t[:-1] for n, t in tables.items() if not n.startswith("solver")}),
            "nothing that fits is given to",
        ),
    ],
)
def test_tables_that_do_not_fit_are_refused(bundle, change, message):
    tables = load_file(bundle / "tables.safetensors")
    change(tables)
    save_file(tables, bundle / "tables.safetensors")
    reseal(bundle, lambda record: None)
    with refused(message):
        open_bundle(bundle)


def test_weights_lie_in_the_bundle(bundle):
    model = onnx.load(bundle / "vae_decoder.onnx", load_external_data=False)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    next(entry for entry in tensor.external_data if entry.key == "location").value = "../secret"
    (bundle / "vae_decoder.onnx").write_bytes(model.SerializeToString())
    reseal(bundle, lambda record: None)
    with refused(r"has weights in '\.\./secret', which is not among its files"):
        open_bundle(bundle)


@pytest.mark.parametrize("name", ["tables.safetensors", "vae_decoder.onnx", "subnet.json", "transformer", "vae"])
@pytest.mark.parametrize("inside", [True, False])
def test_no_link_leads_anywhere(bundle, name, inside):
    target = (bundle if inside else bundle.parent) / "moved"
    (bundle / name).rename(target)
    (bundle / name).symlink_to(target)
    with refused("lies behind a link, which a bundle has none of; copy the bundle with cp -rL"):
        open_bundle(bundle)


def test_a_bundle_behind_a_link_is_one(bundle):
    (bundle.parent / "link").symlink_to(bundle)
    assert open_bundle(bundle.parent / "link").record.graphs


@pytest.mark.parametrize(
    "name", ["tables.safetensors", "vae_decoder.onnx", "transformer/diffusion_pytorch_model.safetensors"]
)
def test_sparse_files_are_not_read(bundle, name):
    """Their checksum would take a minute."""
    os.truncate(bundle / name, 50 * 2**30)
    reseal(bundle, lambda record: record["files"][name].update(bytes=50 * 2**30), checksums=False)
    with refused(f"{name}: (larger than any such part|truncated or damaged)"):
        open_bundle(bundle)


def test_what_a_graph_cannot_compute_is_one_line(bundle):
    """As of a class that the model does not have, in a bundle that does not say which it has."""
    reseal(bundle, lambda record: record["conditioning"].update(labels={}))
    with dipgo.load(bundle) as program, refused(r"\.onnx: ONNX Runtime refuses it .*out of"):
        program.generate([10**6], 0)


TEXT = {"file": "a.onnx", "inputs": [], "outputs": [], "unconditional": "zeros", "lower": False, "fixed": {}}
TOKENIZER = {"file": "a.json", "ids": "ids", "mask": None, "length": 1, "pad_token": "", "pad_id": 0}
OTHER = "../other"


@pytest.mark.parametrize(
    "change",
    [
        lambda record: next(iter(record["graphs"].values())).update(file=OTHER),
        lambda record: record["prologues"][0].update(file=OTHER),
        lambda record: record["decoder"].update(file=OTHER),
        lambda record: record["conditioning"].update(encoder=TEXT | {"file": OTHER, "tokenizers": []}),
        lambda record: record["conditioning"].update(
            encoder=TEXT | {"file": "vae_decoder.onnx", "tokenizers": [TOKENIZER | {"file": OTHER}]}
        ),
        lambda record: record.update(tables_file=OTHER),
        lambda record: record.update(subnet_file=OTHER),
    ],
)
def test_files_without_a_checksum_are_refused(bundle, change):
    shutil.copyfile(bundle / "tables.safetensors", bundle.parent / "other")
    reseal(bundle, change)
    for check_files in (True, False):
        with refused(r"bundle\.json: '\.\./other' is not among its files; export it again"):
            open_bundle(bundle, check_files)


def test_tables_that_are_none_are_refused(bundle):
    path = bundle / "tables.safetensors"
    path.write_bytes(bytes(path.stat().st_size))
    with refused(r"tables\.safetensors: not a safetensors file .*; export it again"):
        open_bundle(bundle, check_files=False)


def test_tensors_are_those_of_the_graphs(bundle):
    tensors = open_bundle(bundle).record.tensors
    assert sorted(tensors) == sorted(path.name for path in bundle.glob("*.onnx"))
    for file, (inputs, outputs) in tensors.items():
        graph = onnx.load(bundle / file, load_external_data=False).graph
        assert {tensor.name for tensor in inputs} == {value.name for value in graph.input}
        assert {tensor.name for tensor in outputs} == {value.name for value in graph.output}


def test_no_bundle(tmp_path):
    with refused("no such bundle"):
        open_bundle(tmp_path / "none")
    with refused("no such bundle"):
        open_bundle(tmp_path)


def test_another_schema_is_refused(bundle):
    document = json.loads((bundle / "bundle.json").read_text())
    (bundle / "bundle.json").write_text(json.dumps(document | {"schema": "dipgo.bundle/2"}))
    with refused(r"schema is 'dipgo\.bundle/2'"):
        open_bundle(bundle)


def test_existing_folder_is_kept_without_force(bundle, task, prepared):
    before = (bundle / "bundle.json").read_bytes()
    other = random_subnet(task.trace, task.sampler, seed=9)
    with misused("--force"):
        write_bundle(prepared, other, task.sampler, bundle)
    assert (bundle / "bundle.json").read_bytes() == before
    write_bundle(prepared, other, task.sampler, bundle, force=True)
    assert not [name for name in open_bundle(bundle).tables if name.startswith("backup.")]


def test_failure_leaves_nothing(task, prepared, tmp_path, monkeypatch):
    import export.compiler

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export.compiler, "save_file", full_disk)
    with refused("disk is full"):
        write_bundle(prepared, random_subnet(task.trace, task.sampler, 0), task.sampler, tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_subnet_of_another_model_is_refused(task, tiny_dit, tmp_path):
    subnet = random_subnet(task.trace, task.sampler, seed=0)
    other = tmp_path / "other"
    shutil.copytree(tiny_dit, other)
    weights = other / "transformer" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with refused(r"its weights .* is not that of"):
        compile_subnet(subnet, find_model(str(other)), tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_damaged_model_folders_are_refused(tiny_dit, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_dit, other)
    weights = other / "transformer" / "diffusion_pytorch_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    with refused("truncated or damaged"):
        find_model(str(other))
    weights.unlink()
    with refused("no safetensors weights"):
        find_model(str(other))
    (other / "model_index.json").unlink()
    with refused(r"no model_index\.json"):
        find_model(str(other))
    with refused("no model 'nowhere': neither built in"):
        find_model("nowhere")
