"""Tokens that mean more than their text: textual inversions, and tokenizers of another length."""

import json
import shutil

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from dipgo.base.errors import DipgoError, DipgoWarning
from dipgo.model.families.unet import TOKENS
from dipgo.model.models import find_model
from engines.pipeline.text import TextEncoder
from export.components import left_out
from export.text import text_to_onnx
from tests import zoo

PROMPTS = ["a <cat> by <dog>", "<cat>", "<cat>_1 alone", "no token", "fox " * 24 + "<cat> a b c"]


@pytest.fixture(scope="module")
def inverted(tmp_path_factory):
    """A pipeline with textual inversions of three vectors, ``<cat>``, and of one, ``<dog>``."""
    folder = tmp_path_factory.mktemp("inverted") / "sd"
    pipe = zoo.model("sd").pipeline()
    pipe.tokenizer.add_tokens(["<cat>", "<cat>_1", "<cat>_2", "<dog>"])
    torch.manual_seed(0)
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))
    pipe.save_pretrained(folder)
    return find_model(str(folder))


def test_textual_inversions_are_the_pipeline_s(inverted, tmp_path):
    graphs, record, files = text_to_onnx(inverted, 2, torch.float32)
    graph = graphs[record.file]
    assert record.tokenizers[0].expands == {"<cat>": "<cat> <cat>_1 <cat>_2"}
    ir.save(graph, inverted.folder / record.file)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    session = onnxruntime.InferenceSession(str(inverted.folder / record.file))
    names = [output.name for output in session.get_outputs()]
    encoder = TextEncoder(
        record, tmp_path, lambda file, inputs: dict(zip(names, session.run(names, inputs), strict=True))
    )
    with pytest.warns(DipgoWarning, match="the prompt is cut at 77 tokens; not read: 'a b c'"):
        conditions = encoder(PROMPTS, None, guided=False)["encoder_hidden_states"]
    expected, _ = inverted.pipeline().encode_prompt(PROMPTS, "cpu", 1, False)
    assert np.abs(conditions - expected.numpy()).max() <= 1e-5


def test_tokenizers_of_another_length_are_refused(tmp_path):
    folder = shutil.copytree(zoo.pipeline("sd"), tmp_path / "long")
    file = folder / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": 248}))
    with pytest.raises(DipgoError, match=rf"tokenizer: cuts prompts at 248 tokens, not at {TOKENS}; not supported"):
        text_to_onnx(find_model(str(folder)), 1, torch.float32)


def test_what_a_bundle_leaves_out_is_said(tmp_path):
    folder = shutil.copytree(zoo.pipeline("sd"), tmp_path / "sd")
    assert left_out(find_model(str(folder))) == []
    file = folder / "model_index.json"
    entry = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    file.write_text(json.dumps(json.loads(file.read_text()) | entry))
    (line,) = left_out(find_model(str(folder)))
    assert line.startswith("the bundle has no safety checker: images that StableDiffusionPipeline blackens")
