"""A bundle with anything missing or altered is refused in one line."""

import json
import shutil

import jsonschema
import onnx
import pytest

from dipgo.model.models import find_model
from export.bundle import SCHEMA_FILE, BundleRecord, json_schema, open_bundle
from export.compiler import compile_subnet, write_bundle
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
    with refused(f"{name}: (missing|altered).*export it again"):
        open_bundle(bundle)


def test_altered_and_other_records_are_refused(bundle, tmp_path):
    document = json.loads((bundle / "bundle.json").read_text())
    assert json.loads(SCHEMA_FILE.read_text()) == json_schema()
    jsonschema.validate(document, json_schema())
    document["steps"][1]["timestep"] += 1
    (bundle / "bundle.json").write_text(json.dumps(document))
    with refused(r"bundle\.json: altered since the bundle was made"):
        open_bundle(bundle)
    (bundle / "bundle.json").write_text(json.dumps(document | {"schema": "dipgo.bundle/2"}))
    with refused(r"schema is 'dipgo\.bundle/2'"):
        open_bundle(bundle)
    for none in (tmp_path / "none", tmp_path):
        with refused("no such bundle"):
            open_bundle(none)


def reseal(folder, change):
    """Change a record as somebody would who makes its checksum fit."""
    document = json.loads((folder / "bundle.json").read_text())
    change(document)
    (folder / "bundle.json").write_text(BundleRecord.model_validate(document).sealed().text())


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


def test_existing_folder_is_kept_without_force(bundle, task, prepared):
    before = (bundle / "bundle.json").read_bytes()
    other = random_subnet(task.trace, task.sampler, seed=9)
    with misused("--force"):
        write_bundle(prepared, other, task.sampler, bundle)
    assert (bundle / "bundle.json").read_bytes() == before
    write_bundle(prepared, other, task.sampler, bundle, force=True)
    assert not [name for name in open_bundle(bundle).tables if name.startswith("backup.")]


def test_failure_leaves_nothing(task, prepared, tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("export.compiler.save_file", full_disk)
    with refused("disk is full"):
        write_bundle(prepared, random_subnet(task.trace, task.sampler, 0), task.sampler, tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_subnets_of_other_models_and_damaged_model_folders_are_refused(task, tiny_dit, tmp_path):
    other = shutil.copytree(tiny_dit, tmp_path / "other")
    weights = other / "transformer" / "diffusion_pytorch_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with refused(r"its weights .* is not that of"):
        compile_subnet(random_subnet(task.trace, task.sampler, seed=0), find_model(str(other)), tmp_path / "b")
    assert not (tmp_path / "b").exists()
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
