"""A pipeline's other components as ONNX: the VAE's decoder against the VAE, names in old checkpoints, refusals."""

import json
import shutil
from functools import partial
from importlib.util import find_spec

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from dipgo.model.models import find_model
from export.component_weights import weights_of
from export.components import VAE, component_dtype, components_of, empty_component
from export.decoder import decoder_to_onnx
from export.text import text_to_onnx
from tests import zoo
from tests.checks import error, refused

SHAPE = (2, 4, 8, 8)


@pytest.fixture
def copied(tmp_path):
    def copy(name):
        return find_model(shutil.copytree(zoo.pipeline(name), tmp_path / name).as_posix())

    return copy


def decode(model, dtype, latent):
    """Run the decoder's graph from the pipeline's own folder."""
    weights = weights_of(model, VAE, dtype, model.folder)
    graph, record = decoder_to_onnx(model, latent.shape, dtype, weights)
    path = model.folder / record.file
    ir.save(graph, path)
    onnx.checker.check_model(str(path), full_check=True)
    session = onnxruntime.InferenceSession(str(path))
    return session.run([record.output.name], {record.input.name: latent.numpy()})[0], record


def pixels(vae, latent):
    with torch.no_grad():
        made = vae.decode(latent / vae.config.scaling_factor, return_dict=False)[0]
    return (made.float() / 2 + 0.5).clamp(0, 1).numpy()


def latents():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["dit", "sd", "sdxl", "pixart", "sana"])
def test_decoder_equals_the_vae(copied, name):
    """In half it is as far off as torch in float16, and takes and gives float32; SDXL's stays in float32."""
    model, latent = copied(name), latents()
    vae = model.pipeline().vae
    exact = pixels(vae, latent)
    actual, record = decode(model, torch.float32, latent)
    assert actual.dtype == np.float32
    assert list(actual.shape) == record.output.shape
    assert np.abs(actual - exact).max() <= 1e-5
    assert exact.std() > 0.01
    if name not in ("sd", "sdxl"):
        return
    actual, record = decode(model, torch.float16, latent)
    assert record.input.dtype == record.output.dtype == "float32"
    if name == "sdxl":
        assert component_dtype(model, VAE, torch.float16) == torch.float32
        assert np.abs(actual - exact).max() <= 1e-5
        return
    assert 1e-5 < error(actual, exact) <= 2 * error(pixels(vae.half(), latent.half()), exact) + 1e-4
    path = model.folder / record.file  # which holds no weights
    tensors = onnx.load(str(path), load_external_data=False).graph.initializer
    external = [tensor for tensor in tensors if tensor.data_location == onnx.TensorProto.EXTERNAL]
    assert len(external) > 10
    assert sum(len(tensor.raw_data) for tensor in tensors) <= 1000
    assert path.stat().st_size < 1_000_000
    assert b"stack_trace" not in path.read_bytes()


def test_latents_are_shifted_and_spread_where_the_vae_says_so(copied):
    model = copied("sd")
    path = model.folder / "vae" / "config.json"
    config = json.loads(path.read_text())
    latent, vae = latents(), model.pipeline().vae
    path.write_text(json.dumps(config | {"shift_factor": 0.3}))
    shifted = pixels(vae, latent + 0.3 * vae.config.scaling_factor)
    assert np.abs(decode(model, torch.float32, latent)[0] - shifted).max() <= 1e-5
    mean, deviation = [0.1, 0.2, -0.3, 0.4], [1.0, 2.0, 0.5, 1.5]
    path.write_text(json.dumps(config | {"latents_mean": mean, "latents_std": deviation}))
    by_channel = [torch.tensor(values).view(1, -1, 1, 1) for values in (mean, deviation)]
    spread = pixels(vae, latent * by_channel[1] + by_channel[0] * vae.config.scaling_factor)
    assert np.abs(decode(model, torch.float32, latent)[0] - spread).max() <= 1e-5


def test_what_a_pipeline_lacks():
    assert components_of(zoo.model("dit")) == ("vae",)
    assert components_of(zoo.model("sdxl")) == ("vae", "text_encoder", "text_encoder_2")
    assert components_of(find_model("sdxl", random_weights=True)) == ("vae",)
    assert text_to_onnx(zoo.model("dit"), 1, torch.float32) is None
    assert text_to_onnx(zoo.model("cogview4"), 1, torch.float32) is None  # it takes embeddings
    assert text_to_onnx(find_model("sd-1.5", random_weights=True), 1, torch.float32) is None
    assert decoder_to_onnx(zoo.model("unconditional"), SHAPE, torch.float32) is None


def rename(path, names):
    """Rewrite a safetensors file with other names of its tensors."""
    save_file({names(name): tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})


def encode(model):
    """Run the text graph of a pipeline from its own folder."""
    graphs, record, _ = text_to_onnx(model, 1, torch.float32)
    (graph,) = graphs.values()
    ir.save(graph, model.folder / record.file)
    session = onnxruntime.InferenceSession(str(model.folder / record.file))
    ids = np.arange(np.prod(record.inputs[0].shape)).reshape(record.inputs[0].shape) % 30
    given = {value.name: ids if "ids" in value.name else np.ones_like(ids) for value in record.inputs}
    return session.run(None, given)[0], torch.from_numpy(ids)


def test_older_names_of_clip(copied):
    """Before transformers 5, ``text_model.`` came first and the numbers of positions were stored too."""
    model = copied("sd")
    pipe = model.pipeline()
    path = model.folder / "text_encoder" / "model.safetensors"
    tensors = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in load_file(path).items()}
    tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(tensors, path, {"format": "pt"})
    actual, ids = encode(model)
    with torch.no_grad():
        assert np.abs(actual - pipe.text_encoder(ids)[0].numpy()).max() <= 1e-5


def test_older_tokenizer_files(copied):
    """CLIP's used to be a vocabulary and merges; what is written is one file in any case."""
    model = copied("sd")
    expected = model.pipeline().tokenizer("a red fox").input_ids
    whole = model.folder / "tokenizer" / "tokenizer.json"
    vocabulary = json.loads(whole.read_text())["model"]["vocab"]
    whole.with_name("vocab.json").write_text(json.dumps(vocabulary))
    whole.with_name("merges.txt").write_text("#version: 0.2\n")
    whole.unlink()
    _, _, files = text_to_onnx(model, 1, torch.float32)
    assert Tokenizer.from_str(files["tokenizer.json"].decode()).encode("a red fox").ids == expected


def test_a_sentencepiece_model_needs_its_library(copied):
    if find_spec("sentencepiece"):
        pytest.skip("sentencepiece is installed")
    model = copied("pixart")
    (model.folder / "tokenizer" / "tokenizer.json").rename(model.folder / "tokenizer" / "spiece.model")
    with refused(r"tokenizer: only the sentencepiece library reads it; pip install sentence"):
        text_to_onnx(model, 1, torch.float32)


def test_tied_names_and_shards_of_t5(copied):
    """T5's embeddings have two names, of which a checkpoint holds one; real ones lie in shards."""
    model = copied("pixart")
    pipe = model.pipeline()
    folder = model.folder / "text_encoder"
    rename(folder / "model.safetensors", lambda name: name.replace("shared.", "encoder.embed_tokens."))
    actual, ids = encode(model)
    with torch.no_grad():
        expected = pipe.text_encoder(ids, attention_mask=torch.ones_like(ids))[0].numpy()
    assert np.abs(actual - expected).max() <= 1e-5
    (folder / "model.safetensors").unlink()
    pipe.text_encoder.save_pretrained(folder, max_shard_size="2KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    actual, _ = encode(model)
    assert np.abs(actual - expected).max() <= 1e-5


def test_older_names_of_a_vae_s_attention(copied):
    model = copied("sd")
    vae, latent = model.pipeline().vae, latents()
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}

    def older(name):
        for new, word in old.items():
            name = name.replace(new, word)
        return name

    rename(model.folder / "vae" / "diffusion_pytorch_model.safetensors", older)
    assert np.abs(decode(model, torch.float32, latent)[0] - pixels(vae, latent)).max() <= 1e-5


def drop_tensor(path, name):
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path, {"format": "pt"})


TEXT, VAE_FILE = "text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors"
NO_TOKENIZER = r"tokenizer: neither tokenizer\.json nor vocab\.json and merges\.txt"
DAMAGED = [
    (lambda f: (f / TEXT).unlink(), r"text_encoder: no safetensors weights"),
    (lambda f: (f / TEXT).write_bytes(b"\x10\0\0\0\0\0\0\0{}"), rf"{TEXT}: truncated or damaged"),
    (lambda f: drop_tensor(f / TEXT, "final_layer_norm.bias"), rf"{TEXT}: holds no tensor 'final_layer_norm\.bias'"),
    (lambda f: (f / "text_encoder/config.json").unlink(), r"text_encoder/config\.json: no such configuration"),
    (lambda f: shutil.rmtree(f / "tokenizer"), NO_TOKENIZER),
    (lambda f: (f / "tokenizer/tokenizer.json").write_text("{"), r"tokenizer: not a tokenizer .*or save it again"),
    (lambda f: (f / VAE_FILE).unlink(), r"vae: no safetensors weights"),
    (lambda f: drop_tensor(f / VAE_FILE, "decoder.conv_out.bias"), r"holds no tensor 'decoder\.conv_out\.bias'"),
    (lambda f: (f / "vae/config.json").write_text('{"act_fn": 7}'), r"vae: not a configuration of AutoencoderKL"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGED)
def test_incomplete_components_are_refused(copied, damage, message):
    model = copied("sd")
    damage(model.folder)
    with refused(message):
        text_to_onnx(model, 1, torch.float32)
        decoder_to_onnx(model, SHAPE, torch.float32)


def test_a_text_encoder_of_another_model_is_refused(copied):
    model = copied("sd")
    shutil.rmtree(model.folder / "text_encoder")
    shutil.copytree(f"{zoo.pipeline('sdxl')}/text_encoder", model.folder / "text_encoder")
    with refused(r"makes 'encoder_hidden_states' \[1, 77, 8\], the denoiser takes \[1, 77, 24\]"):
        text_to_onnx(model, 1, torch.float32)


def test_only_classes_of_the_two_libraries_are_built(copied):
    """``model_index.json`` names modules to import; no other may be."""
    model = copied("sd")
    path = model.folder / "model_index.json"
    index = json.loads(path.read_text())
    for name, convert in (
        (VAE, lambda: decoder_to_onnx(model, SHAPE, torch.float32)),
        ("text_encoder", lambda: text_to_onnx(model, 1, torch.float32)),
    ):
        path.write_text(json.dumps(index | {name: ["antigravity", index[name][1]]}))
        for build in (convert, partial(empty_component, model, name, torch.float32)):
            with refused(rf"the {name} is a \w+ of 'antigravity'.* only classes of diffusers"):
                build()
