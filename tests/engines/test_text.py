"""Prompts through a bundle's tokenizers and text graph equal the pipeline's own ``encode_prompt``."""

import shutil

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from transformers import CLIPTokenizer

from dipgo.base.errors import UsageError
from dipgo.model.models import find_model
from engines.pipeline.text import TextEncoder
from export.component_weights import weights_of
from export.components import components_of
from export.text import text_to_onnx
from tests import zoo
from tests.checks import refused

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
    graphs, record, files = text_to_onnx(model, ROWS, dtype, weights)
    graph = graphs[record.file]
    record = record.model_copy(update={"file": f"{dtype}.onnx".removeprefix("torch.")})
    ir.save(graph, model.folder / record.file)
    for name, content in files.items():
        (model.folder / name).write_bytes(content)
    return TextEncoder(record, model.folder, run_in(model.folder))


@pytest.fixture(scope="module")
def encoder(model):
    return exported(model, torch.float32)


def reference(kind, pipe, prompts, negative=None):
    """Return what the pipeline itself gives its denoiser: the unconditional rows, then the conditional, in float32."""
    one_for_all = kind in ("pixart", "sigma")
    given = {} if negative is None else {"negative_prompt": negative if one_for_all else [negative] * len(prompts)}
    given |= {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    conditional, *more = pipe.encode_prompt(prompts, **given)
    if kind == "sd":
        passes = {"encoder_hidden_states": (more[0], conditional)}
    elif kind == "sdxl":
        sizes = torch.tensor([[16.0, 16.0, 0.0, 0.0, 16.0, 16.0]]).repeat(len(prompts), 1)
        passes = {"encoder_hidden_states": (more[0], conditional), "text_embeds": (more[2], more[1])}
        passes |= {"time_ids": (sizes, sizes)}
    else:
        passes = {"encoder_hidden_states": (more[1], conditional), "encoder_attention_mask": (more[2], more[0])}
        if kind == "pixart":  # Alpha's largest takes sizes too
            passes |= {"resolution": (torch.full((len(prompts), 2), 1024.0),) * 2}
            passes |= {"aspect_ratio": (torch.ones(len(prompts), 1),) * 2}
    return {name: torch.cat(both).float().numpy() for name, both in passes.items()}


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


def test_graphs_are_valid_in_half_too_and_hold_no_weights(model, encoder):
    path = model.folder / encoder.record.file
    onnx.checker.check_model(str(path), full_check=True)
    graph = onnx.load(str(path), load_external_data=False).graph
    length = encoder.record.tokenizers[0].length
    shapes = [[size.dim_value for size in value.type.tensor_type.shape.dim] for value in graph.input]
    assert all(shape == [ROWS, length] for shape in shapes)
    external = [tensor for tensor in graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    files = {entry.value for tensor in external for entry in tensor.external_data if entry.key == "location"}
    assert files == {f"{name}/model.safetensors" for name in components_of(model)[1:]}
    whole = (onnx.TensorProto.BOOL, onnx.TensorProto.INT64)  # masks and relative positions alone
    for tensor in graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            assert tensor.data_type in whole or len(tensor.raw_data) <= 8, tensor.name
            assert len(tensor.raw_data) <= 2 * 8 * length**2
    half = exported(model, torch.bfloat16).record
    onnx.checker.check_model(str(model.folder / half.file), full_check=True)
    assert {output.dtype for output in half.outputs} == {"bfloat16"}


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
    with refused(f"{last.name}: not a readable tokenizer .*export the bundle again"):
        TextEncoder(record, tmp_path, run_in(tmp_path))
