"""Prompts through a bundle's tokenizers and text graph equal the pipeline's own ``encode_prompt``."""

import shutil
import subprocess
import sys

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from transformers import CLIPTokenizer

from dipgo.base.errors import DipgoError, UsageError
from dipgo.model.models import find_model
from engines.pipeline.text import TextEncoder
from export.component_weights import weights_of
from export.components import components_of
from export.text import text_to_onnx
from tests import zoo

PROMPTS = ["a red fox", "", "  Ünïcödé 猫 & <b>HTML</b>, 3.5!\n", "fox " * 200]
KINDS = {"sd": "sd", "sdxl": "sdxl", "pixart": "pixart-1024", "sigma": "pixart-sigma"}
ROWS = 3  # fewer than the prompts, and no divisor of their number


def run_in(folder):
    def run(file, inputs):
        session = onnxruntime.InferenceSession(str(folder / file))
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, dict(inputs)), strict=True))

    return run


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def model(kind, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines") / kind
    shutil.copytree(zoo.pipeline(KINDS[kind]), folder)
    if kind == "sdxl":  # as the real one: the second tokenizer pads with a token of its own
        CLIPTokenizer.from_pretrained(folder / "tokenizer_2", pad_token="z").save_pretrained(folder / "tokenizer_2")
    return find_model(str(folder))


def exported(model, dtype):
    """Write the text graph into the pipeline's folder, beside the weights."""
    weights = {name: weights_of(model, name, dtype, model.folder) for name in components_of(model)[1:]}
    graph, record, files = text_to_onnx(model, ROWS, dtype, weights)
    record = record.model_copy(update={"file": f"{dtype}.onnx".removeprefix("torch.")})
    ir.save(graph, model.folder / record.file)
    for name, content in files.items():
        (model.folder / name).write_bytes(content)
    return TextEncoder(record, model.folder, run_in(model.folder))


@pytest.fixture(scope="module")
def encoder(model):
    return exported(model, torch.float32)


def reference(kind, pipe, prompts, negative=None):
    """Return what the pipeline itself gives its denoiser: the unconditional half, then the conditional, in float32."""
    given = {} if negative is None else {"negative_prompt": [negative] * len(prompts)}
    if kind == "sd":
        conditional, unconditional = pipe.encode_prompt(prompts, "cpu", 1, True, **given)
        halves = {"encoder_hidden_states": (unconditional, conditional)}
    elif kind == "sdxl":
        conditional, unconditional, pooled, null_pooled = pipe.encode_prompt(prompts, device="cpu", **given)
        sizes = torch.tensor([[16.0, 16.0, 0.0, 0.0, 16.0, 16.0]]).repeat(len(prompts), 1)
        halves = {
            "encoder_hidden_states": (unconditional, conditional),
            "text_embeds": (null_pooled, pooled),
            "time_ids": (sizes, sizes),
        }
    else:
        if negative is not None:
            given = {"negative_prompt": negative}
        conditional, mask, unconditional, null_mask = pipe.encode_prompt(prompts, device="cpu", **given)
        halves = {
            "encoder_hidden_states": (unconditional, conditional),
            "encoder_attention_mask": (null_mask, mask),
        }
        if kind == "pixart":  # Alpha's largest takes sizes too
            halves["resolution"] = (torch.full((len(prompts), 2), 1024.0),) * 2
            halves["aspect_ratio"] = (torch.ones(len(prompts), 1),) * 2
    return {name: torch.cat(both).float().numpy() for name, both in halves.items()}


def test_ids_are_the_tokenizers_own(model, encoder):
    pipe = model.pipeline()
    tokens = encoder.tokens(PROMPTS)
    texts = [text.lower().strip() for text in PROMPTS] if encoder.record.lower else PROMPTS
    for record in encoder.record.tokenizers:
        tokenizer = getattr(pipe, record.file.removesuffix(".json"))
        expected = tokenizer(texts, padding="max_length", max_length=record.length, truncation=True)
        assert tokens[record.ids].tolist() == expected.input_ids
        assert len(set(map(tuple, expected.input_ids))) == len(PROMPTS)
        assert tokens[record.ids][3, -1] == tokenizer.eos_token_id  # of the prompt that was cut
        if record.mask is not None:
            assert tokens[record.mask].tolist() == expected.attention_mask
    assert set(tokens) == {value.name for value in encoder.record.inputs}


@pytest.mark.parametrize("negative", [None, "", "ugly, blurred"])
def test_conditions_are_the_pipelines(kind, model, encoder, negative):
    expected = reference(kind, model.pipeline(), PROMPTS, negative)
    conditions = encoder(PROMPTS, negative, guided=True)
    assert set(conditions) == set(expected) == set(model.family.example(model.config, 1))
    for name, value in expected.items():
        assert conditions[name].shape == value.shape
        assert conditions[name].dtype == np.float32
        assert np.abs(conditions[name] - value).max() <= 1e-5
    alone = encoder(PROMPTS[:1], negative, guided=False)
    for name, value in expected.items():
        assert np.abs(alone[name] - value[len(PROMPTS)]).max() <= 1e-5
        assert len(alone[name]) == 1


def test_half_precision_is_as_good_as_torch_s(kind, model):
    """Against float32, the graph in float16 is about as far off as the pipeline in float16."""
    exact = reference(kind, model.pipeline(), PROMPTS)
    pipe = model.pipeline()
    for name in components_of(model)[1:]:  # loaded anew, not .half(): some of T5's weights stay in float32
        loaded = type(getattr(pipe, name)).from_pretrained(model.folder / name, dtype=torch.float16)
        setattr(pipe, name, loaded.eval().requires_grad_(False))
    half = reference(kind, pipe, PROMPTS)
    encoder = exported(model, torch.float16)
    conditions = encoder(PROMPTS, None, guided=True)
    for name, value in exact.items():
        assert conditions[name].dtype == np.float16
        distance = np.linalg.norm(conditions[name].astype(np.float32) - value)
        assert distance <= 2 * np.linalg.norm(half[name] - value) + 1e-4 * np.linalg.norm(value)


def test_graph_is_valid_and_holds_no_weights(model, encoder):
    path = model.folder / encoder.record.file
    onnx.checker.check_model(str(path), full_check=True)
    graph = onnx.load(str(path), load_external_data=False).graph
    assert {tuple(size.dim_value for size in value.type.tensor_type.shape.dim) for value in graph.input} == {
        (ROWS, encoder.record.tokenizers[0].length)
    }
    external = [tensor for tensor in graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    files = {entry.value for tensor in external for entry in tensor.external_data if entry.key == "location"}
    assert files == {f"{name}/model.safetensors" for name in components_of(model)[1:]}
    length = encoder.record.tokenizers[0].length
    for tensor in graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:  # masks and relative positions alone
            assert tensor.data_type in (onnx.TensorProto.BOOL, onnx.TensorProto.INT64) or len(tensor.raw_data) <= 8, (
                tensor.name
            )
            assert len(tensor.raw_data) <= 2 * 8 * length**2


def test_bfloat16_is_valid(model):
    weights = {name: weights_of(model, name, torch.bfloat16, model.folder) for name in components_of(model)[1:]}
    graph, record, _ = text_to_onnx(model, 1, torch.bfloat16, weights)
    ir.save(graph, model.folder / "bfloat16.onnx")
    onnx.checker.check_model(str(model.folder / "bfloat16.onnx"), full_check=True)
    assert {output.dtype for output in record.outputs} == {"bfloat16"}


def test_runs_without_torch_and_transformers(model, encoder):
    (model.folder / "record.json").write_text(encoder.record.text())
    script = f"""
import sys
for name in ("torch", "diffusers", "transformers", "onnx", "onnx_ir"):
    sys.modules[name] = None
import json
from pathlib import Path
import onnxruntime
from engines.pipeline.text import TextEncoder
from export.bundle import TextRecord
folder = Path({str(model.folder)!r})
record = TextRecord.model_validate_json((folder / "record.json").read_text())
session = onnxruntime.InferenceSession(str(folder / record.file))
def run(file, inputs):
    return dict(zip([output.name for output in session.get_outputs()], session.run(None, inputs)))
print(float(abs(TextEncoder(record, folder, run)(["a fox"], None, True)["encoder_hidden_states"]).sum()))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    here = np.abs(encoder(["a fox"], None, guided=True)["encoder_hidden_states"]).sum()
    assert float(result.stdout) == pytest.approx(float(here), rel=1e-5)


def test_half_a_character_is_refused(encoder):
    """What Python makes of bytes on the command line that are no UTF-8."""
    line = r"the prompt is not valid Unicode \('\\udcff' at character 3\); give it in UTF-8"
    for prompts, negative in ((["a fox", "a f\udcffx"], ""), (["a fox"], "a f\udcffx")):
        with pytest.raises(UsageError, match=line):
            encoder(prompts, negative, guided=True)


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_damaged_tokenizer_files_are_refused(model, encoder, tmp_path, damage):
    record = encoder.record
    for tokenizer in record.tokenizers:
        content = (model.folder / tokenizer.file).read_text()
        (tmp_path / tokenizer.file).write_text(content)
    last = tmp_path / record.tokenizers[-1].file
    if damage == "missing":
        last.unlink()
    else:
        last.write_text(content[: len(content) // 2])
    with pytest.raises(DipgoError, match=f"{last.name}: not a readable tokenizer .*export the bundle again") as caught:
        TextEncoder(record, tmp_path, run_in(tmp_path))
    assert "\n" not in str(caught.value)
